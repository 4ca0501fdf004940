"""Every job hurt while it runs: in the end the same bytes, or exit 5 first; no process stays.

Drivers are killed at random moments, drawn from the length of a quiet run with a fixed seed;
workers are killed or stopped while they work. Every job is started many times; it takes minutes:

    pytest tests/workflows/test_job_faults.py -m slow     the most usual jobs, hurt once
    pytest tests/workflows/test_job_faults.py -m long     every job and fault, three kills each
"""

import random
import time
from functools import cache

import pytest
from job_runs import (
    KEPT,
    PATIENCE,
    family,
    finetune_plain,
    finish,
    gone,
    kill,
    recipe_of_job,
    said,
    start,
    until,
    visible,
    wide_adapters,
    workers,
    write_recipe,
)
from ray_samples import ROOT, hashes

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
ONCE = [pytest.param("merge", 1, marks=pytest.mark.slow)]


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
    names = {path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")}
    assert names - {*WHOLE, *PARTS} == {"prepare", "benchmark"}, "these two keep nothing"


TITLES = {
    "merge": "ray::_me",  # measures and merges
    "evidence": "ray::AdapterActor.evidence",
    "learn": "ray::TaskActor.step",
    "search": "ray::AdapterActor.measure",
    "finetune": "ray::_train",
    "train_fusion": "ray::RayTrainWorker",
}
"""What Ray calls a worker while it does a job's work."""
TIMEOUT = 60


def busy(job, made, root, **resources):
    """Start a job and wait until one of its workers works; return driver, worker and recipe."""
    plain = recipe_of_job(job, root / "out", *made)
    plain["resources"] = {**plain["resources"], **resources}
    recipe = write_recipe(root, job, plain)
    driver = start(job, recipe)
    (worker, *_) = until(lambda: workers(driver, TITLES[job]), driver)
    return driver, worker, recipe


@pytest.mark.parametrize("job", [pytest.param(job, marks=pytest.mark.long) for job in TITLES])
def test_a_worker_that_hangs_is_noticed_and_the_job_goes_on_later(job, quiet, made, tmp_path):
    _, expected = quiet(job)
    driver, worker, recipe = busy(job, made, tmp_path, timeout_seconds=TIMEOUT)
    everyone = family(driver)
    worker.suspend()
    stopped = time.monotonic()
    code = driver.wait(timeout=6 * TIMEOUT)
    assert gone(everyone, 30) == []
    # A Fusion-VAE's workers are all started anew, unless they hang while they start.
    assert code == 5 or (job == "train_fusion" and code == 0), said(recipe)
    if code == 5:
        limit = 4 if job == "train_fusion" else 2
        assert time.monotonic() - stopped < limit * TIMEOUT
        assert "un the same command" in said(recipe).splitlines()[-1]
    finish(job, recipe)
    assert bytes_of(job, tmp_path / "out") == expected


@pytest.mark.parametrize("job", [pytest.param(job, marks=pytest.mark.long) for job in TITLES])
def test_a_worker_that_is_killed_leaves_no_trace(job, quiet, made, tmp_path):
    _, expected = quiet(job)
    driver, worker, recipe = busy(job, made, tmp_path)
    worker.kill()
    assert driver.wait(timeout=PATIENCE) == 0, said(recipe)
    assert bytes_of(job, tmp_path / "out") == expected


@pytest.mark.long
def test_workers_without_memory_end_the_job_with_four(made, tmp_path):
    """The node is over Ray's limit at any time, so each worker is killed as soon as it works."""
    recipe = write_recipe(tmp_path, "merge", recipe_of_job("merge", tmp_path / "out", *made))
    limit = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50"}
    driver = start("merge", recipe, **limit)
    everyone = until(lambda: workers(driver, "ray::"), driver)
    assert driver.wait(timeout=PATIENCE) == 4, said(recipe)
    assert gone(everyone, 30) == []
    assert "memory" in said(recipe).splitlines()[-1]
    assert not (tmp_path / "out").exists()
