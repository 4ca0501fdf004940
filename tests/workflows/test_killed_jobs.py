"""Drivers killed at random moments, every job: rerun, it ends in the same bytes; no process stays.

Each kill is drawn from the length of a quiet run, with a fixed seed. They take minutes:

    pytest tests/workflows/test_killed_jobs.py -m slow     one kill of the two most usual jobs
    pytest tests/workflows/test_killed_jobs.py -m long     three kills in a row of every job
"""

import random
import time
from functools import cache

import pytest
from job_runs import (
    KEPT,
    TASKS,
    finetune_plain,
    finish,
    kill,
    recipe_of_job,
    start,
    visible,
    wide_adapters,
    write_recipe,
)
from ray_samples import hashes

from icm_ray.files import read_manifest

OWN_RAY = True
WHOLE = ("merge", "evidence", "learn", "train_fusion")
"""Jobs whose output is one folder, there at the end or not at all."""
PARTS = {"finetune": KEPT, "pipeline": KEPT, "evaluate": ("scores",), "search": ("adapter",)}
"""What is compared of the others: the rest holds clocks."""

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def made(tiny_bert, tmp_path_factory):
    """What recipes are made from: base, trained experts and wide adapters."""
    root = tmp_path_factory.mktemp("made")
    recipe = write_recipe(root, "finetune", finetune_plain(tiny_bert, root / "experts"))
    finish("finetune", recipe)
    return tiny_bert, root / "experts", wide_adapters(root / "wide")


@pytest.fixture(scope="module")
def quiet(made, tmp_path_factory):
    """Return a function: job -> how long a quiet run of it takes, and the bytes it ends in."""

    @cache
    def run(job):
        root = tmp_path_factory.mktemp(f"quiet-{job}")
        recipe = write_recipe(root, job, recipe_of_job(job, root / "out", *made))
        return finish(job, recipe), bytes_of(job, root / "out")

    return run


def bytes_of(job, out):
    if job in WHOLE:
        return hashes(out)
    return {part: hashes(out / part) for part in PARTS[job]}


MANY = [pytest.param(job, 3, marks=pytest.mark.long) for job in (*WHOLE, *PARTS)]
ONCE = [pytest.param(job, 1, marks=pytest.mark.slow) for job in ("merge", "learn")]


@pytest.mark.parametrize(("job", "kills"), [*ONCE, *MANY])
def test_a_job_killed_at_any_moment_ends_in_the_same_bytes(job, kills, quiet, made, tmp_path):
    seconds, expected = quiet(job)
    out, draw = tmp_path / "out", random.Random(f"{job} {kills}")
    recipe = write_recipe(tmp_path, job, recipe_of_job(job, out, *made))
    for _ in range(kills):
        driver = start(job, recipe)
        moment = draw.uniform(0, seconds)
        time.sleep(moment)
        assert kill(driver) == [], f"killed after {moment:.1f} of {seconds:.1f} s"
        for folder in [out] if job in WHOLE and out.exists() else visible(out):
            read_manifest(folder)
    finish(job, recipe)
    assert bytes_of(job, out) == expected
    assert not list(tmp_path.glob(".out.learning-*")) + list(tmp_path.glob(".out.training-*"))


def test_every_job_is_killed():
    from test_jobs import JOBS

    assert {*WHOLE, *PARTS, "prepare", "benchmark"} == set(JOBS), "these two keep nothing"
    assert len(TASKS) == 2
