"""Searches on Ray Tune and Optuna with the tiny base: what is kept, resumed and refused."""

import pyarrow.parquet as pq
import pytest
import yaml
from ray_samples import finetune_recipe, hashes, stamps, write_yaml

from icm_ray.command import run_job
from icm_ray.config import MergeRecipe, SearchRecipe
from icm_ray.files import read_json
from jobs.merge import work as merge_work
from jobs.search import work

TASKS = ["keyword", "supersense"]


@pytest.fixture(scope="module")
def classifiers(tiny_bert, ray_session, tmp_path_factory):
    """Two experts of the tiny base that are right now and then, which a regression is not."""
    from icm_ray.distributed.finetune import finetune
    from icm_ray.distributed.shared_base import share_base

    root = tmp_path_factory.mktemp("classifiers")
    finetune(finetune_recipe(tiny_bert, root, tasks=TASKS), share_base(tiny_bert), "tiny", root)
    return root / "experts" / "shared-seed0"


@pytest.fixture(scope="module")
def recipe(classifiers, tiny_bert):
    return {
        "base": str(tiny_bert),
        "suite": "text",
        "experts": str(classifiers),
        "search": {"params.scale": "loguniform(0.05, 2)"},
        "validation": 24,
        "startup": 3,
        "resources": {"workers": 1, "cpus_per_worker": 0.5},
    }


def run(path, *overrides):
    return run_job(SearchRecipe, work, "", ["-c", str(path), *overrides])


def search(recipe, root, **changes):
    path = write_yaml(root / "search.yaml", {**recipe, "output": str(root / "out"), **changes})
    assert run(path) == 0
    return root / "out"


def points(out):
    return [read_json(path)["point"] for path in sorted((out / "trials").glob("*.json"))]


@pytest.fixture(scope="module")
def out(recipe, tmp_path_factory):
    return search(recipe, tmp_path_factory.mktemp("search"), trials=6, test=24)


def test_the_best_trial_is_an_adapter_with_the_same_score(out):
    told = read_json(out / "results.json")["scores"][str(out)]
    trials = pq.read_table(out / "report" / "trials.parquet").to_pylist()
    assert [trial["state"] for trial in trials] == ["complete"] * 6
    assert all(trial["node"] for trial in trials)
    best = max(trials, key=lambda trial: trial["metrics.validation_mean"])
    assert told["metrics"]["validation_mean"] == best["metrics.validation_mean"]
    assert told["validation"]["mean"] == best["metrics.validation_mean"]
    assert set(told["test"]) == {"mean", "worst", "normalised"}


def test_the_best_recipe_runs_and_makes_the_same_bytes(out, tmp_path):
    before = hashes(out / "adapter")
    again = yaml.safe_load((out / "best.yaml").read_text())
    again["output"]["path"] = str(tmp_path / "again")
    path = write_yaml(tmp_path / "again.yaml", again)
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(path)]) == 0
    assert hashes(tmp_path / "again") == before


def test_a_finished_search_is_not_run_again_and_a_longer_one_goes_on(out):
    recipe = out.with_name("search.yaml")
    before, adapter = stamps(out / "trials"), stamps(out / "adapter")
    first = points(out)
    assert run(recipe) == 0
    assert stamps(out / "trials") == before
    assert stamps(out / "adapter") == adapter
    assert run(recipe, "trials=8") == 0
    assert points(out)[:6] == first
    assert len(points(out)) == 8


def test_an_interrupted_search_asks_for_the_same_points(out, recipe, tmp_path):
    short = search(recipe, tmp_path, trials=3, test=24)
    # As a kill leaves it: the last trial was chosen and never measured.
    from icm_ray.search.ledger import Ledger

    key = read_json(short / "search.json")["key"]
    Ledger(short, key).change(2, state="running", metrics={}, scores={}, rungs={})
    assert run(short.with_name("search.yaml"), "trials=6") == 0
    assert points(short) == points(out)[:6]
    states = [read_json(path)["state"] for path in sorted((short / "trials").glob("*.json"))]
    assert states == ["complete"] * 6
