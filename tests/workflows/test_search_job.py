"""Searches on Ray Tune and Optuna with the tiny base: what is kept, resumed and refused."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from ray_samples import (
    ROOT,
    environment,
    finetune_recipe,
    hashes,
    session_on,
    stamps,
    write_yaml,
)

from icm_ray.command import run_job
from icm_ray.config import MergeRecipe, SearchRecipe, TrainFusionRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import InputError
from icm_ray.evaluation.metrics import Score
from icm_ray.evaluation.scoring import TaskScore
from icm_ray.files import read_json
from icm_ray.search.ledger import Ledger
from icm_ray.workflows.search.material import check_experts
from jobs.merge import work as merge_work
from jobs.search import work

TASKS = ["keyword", "supersense"]


def test_an_expert_that_is_never_right_is_named():
    def scored(metric, value):
        return TaskScore(Score(metric, value, value, value, None), np.zeros((7, 1)))

    check_experts({"good": scored("accuracy", 0.5), "far": scored("rmse", 2.0)})
    with pytest.raises(InputError) as caught:
        check_experts({"good": scored("accuracy", 0.5), "lost": scored("accuracy", 0.0)})
    assert len(caught.value.problems) == 1
    assert "experts: lost: accuracy is 0 on 7 validation examples" in caught.value.problems[0]


@pytest.fixture(scope="module")
def classifiers(tiny_bert, ray_session, tmp_path_factory):
    """Two experts of the tiny base that are right now and then, which a regression is not."""
    from icm_ray.workflows.experts import find_or_train

    root = tmp_path_factory.mktemp("classifiers")
    recipe = finetune_recipe(tiny_bert, root, tasks=TASKS)
    find_or_train(session_on(tiny_bert, **recipe.resources.model_dump()), recipe, root)
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


def write(recipe, root, **changes):
    return write_yaml(root / "search.yaml", {**recipe, "output": str(root / "out"), **changes})


def search(recipe, root, **changes):
    assert run(write(recipe, root, **changes)) == 0
    return root / "out"


def trials(out):
    return [read_json(path) for path in sorted((out / "trials").glob("*.json"))]


def points(out):
    return [trial["point"] for trial in trials(out)]


def told(out):
    return read_json(out / "results.json")["scores"][str(out)]


@pytest.fixture(scope="module")
def out(recipe, tmp_path_factory):
    return search(recipe, tmp_path_factory.mktemp("search"), trials=6, test=24)


@pytest.mark.slow
def test_the_best_trial_is_an_adapter_with_the_same_score(out):
    rows = pq.read_table(out / "report" / "trials.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["complete"] * 6
    assert all(row["node"] for row in rows)
    best = max(rows, key=lambda row: row["metrics.validation_mean"])
    assert told(out)["metrics"]["validation_mean"] == best["metrics.validation_mean"]
    assert told(out)["validation"]["mean"] == best["metrics.validation_mean"]
    assert set(told(out)["test"]) == {"mean", "worst", "normalised"}
    page = (out / "report" / "index.html").read_text()
    assert "params.scale" in page
    assert page.count("<svg") == 2  # history and importance; one objective has no front


@pytest.mark.slow
def test_the_best_recipe_runs_and_makes_the_same_bytes(out, tmp_path):
    again = yaml.safe_load((out / "best.yaml").read_text())
    assert again["output"]["path"] == str(out / "adapter")
    again["output"]["path"] = str(tmp_path / "again")
    path = write_yaml(tmp_path / "again.yaml", again)
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(path)]) == 0
    assert hashes(tmp_path / "again") == hashes(out / "adapter")


@pytest.mark.slow
def test_an_interrupted_search_asks_for_the_same_points(out, recipe, tmp_path):
    """As a kill leaves it: trial 2 was chosen and never measured, later ones never chosen."""
    path = write(recipe, tmp_path, trials=6, test=24)
    shutil.copytree(out, tmp_path / "out")
    key = read_json(tmp_path / "out" / "search.json")["key"]
    Ledger(tmp_path / "out", key).change(2, state="running", metrics={}, scores={}, rungs={})
    for number in (3, 4, 5):
        (tmp_path / "out" / "trials" / f"{number:05d}.json").unlink()
    assert run(path) == 0
    assert points(tmp_path / "out") == points(out)
    assert [t["metrics"] for t in trials(tmp_path / "out")] == [t["metrics"] for t in trials(out)]


@pytest.mark.slow
def test_a_finished_search_is_only_read(out):
    before = {name: stamps(out / name) for name in ("trials", "adapter", "scores")}
    assert run(out.with_name("search.yaml")) == 0
    assert {name: stamps(out / name) for name in before} == before


@pytest.mark.slow
def test_a_damaged_memory_is_refused_and_left_alone(out, tmp_path, capsys):
    recipe = yaml.safe_load(out.with_name("search.yaml").read_text())
    shutil.copytree(out, tmp_path / "out")
    path = write_yaml(tmp_path / "search.yaml", {**recipe, "output": str(tmp_path / "out")})
    trial = tmp_path / "out" / "trials" / "00001.json"
    trial.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/unpickled'\ntR.")
    assert run(path) == 3
    assert f"{trial}: not a trial" in capsys.readouterr().err
    trial.unlink()
    assert run(path, "sampler=random") == 2
    assert "holds another search" in capsys.readouterr().err
    assert len(trials(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("search={params.scale: 'normal(0, 1)'}", 2, "search.params.scale"),
        ("objectives=[entropy]", 2, "data: missing"),
        ("adapters=[{name: a, path: nowhere}]", 2, "experts"),
        ("loggers=[wandb]", 2, "wandb"),
        ("resources={cpus_per_worker: 4000}", 5, "no node can hold one worker"),
        ("halving={by: steps}", 2, "learns nothing"),
        ("objectives=[colour]", 2, "objectives"),
        ("start=[{params.scale: 7.0}]", 2, "outside of what is searched"),
    ],
)
def test_what_cannot_be_searched_is_said_at_once(recipe, tmp_path, capsys, override, code, said):
    path = write(recipe, tmp_path)
    started = time.monotonic()
    if "nowhere" in override:
        code = 3  # there is no such folder to look into
        said = "nowhere"
    assert run(path, override) == code
    assert said in capsys.readouterr().err
    assert time.monotonic() - started < 20


SPACE = {
    "method": "choice(task_arithmetic, della)",
    "della.params.epsilon": "uniform(0, 0.9)",  # more than twice the density is refused
    "della.params.density": "uniform(0.1, 0.5)",
    "params.scale": "loguniform(0.1, 2)",
    "rank": "choice(1, 2, 4)",
}


@pytest.mark.slow
def test_a_front_over_methods_with_trials_that_fail(recipe, ray_session, tmp_path):
    changes = {"search": SPACE, "trials": 16, "start": [], "loggers": ["tensorboard"]}
    changes["objectives"] = ["validation_worst", "output_rank"]
    out = search(recipe, tmp_path, **changes, resources={"workers": 2, "cpus_per_worker": 0.5})
    states = Counter(trial["state"] for trial in trials(out))
    assert set(states) == {"complete", "failed"}
    failed = [t for t in trials(out) if t["state"] == "failed"]
    assert all("epsilon" in t["error"] for t in failed)
    assert told(out)["trials"]["failed"] == len(failed)
    assert set(told(out)["failed"]) == {str(t["number"]) for t in failed}
    front = read_json(out / "report" / "search.json")["front"]
    assert {int(path.stem) for path in (out / "front").glob("*.yaml")} == set(front)
    for path in (out / "front").glob("*.yaml"):
        load_recipe(MergeRecipe, path)
    assert (out / "report" / "index.html").read_text().count("<svg") >= 2
    events = out.with_name("out.logs").rglob("events.out.tfevents*")
    assert any(b"ray/tune/validation_worst" in path.read_bytes() for path in events)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the loggers' own
def test_runs_of_wandb_and_mlflow_are_kept_without_a_server(
    recipe, ray_session, tmp_path, monkeypatch
):
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = search(recipe, tmp_path, trials=2, loggers=["wandb", "mlflow"])
    logs = out.with_name("out.logs")
    assert len(list(logs.glob("wandb/offline-run-*/run-*.wandb"))) == 2
    store = mlflow.MlflowClient(f"sqlite:///{logs}/mlflow.db")
    experiment = store.get_experiment_by_name("icm_ray")
    runs = store.search_runs([experiment.experiment_id])
    found = sorted(run.data.metrics["validation_mean"] for run in runs)
    assert found == pytest.approx(sorted(t["metrics"]["validation_mean"] for t in trials(out)))


@pytest.mark.slow
def test_early_stopping_spares_most_of_the_work(recipe, ray_session, tmp_path):
    out = search(recipe, tmp_path, trials=10, halving={"first": 6, "factor": 2})
    states = Counter(trial["state"] for trial in trials(out))
    assert set(states) == {"complete", "stopped"}
    for trial in trials(out):
        assert set(trial["rungs"]) <= {"6", "12", "24"}
        assert ("24" in trial["rungs"]) == (trial["state"] == "complete")
    # ASHA's memory goes on: a new trial meets the old ones' rungs.
    assert run(out.with_name("search.yaml"), "trials=14") == 0
    assert len(trials(out)) == 14
    assert told(out)["validation"]["mean"] == told(out)["metrics"]["validation_mean"]


LEARNED = {
    "method": "nsc",
    "learn": {"optimisation": {"steps": 8, "batch": 4}},
    "search": {"learn.optimisation.lr": "loguniform(0.001, 0.3)"},
    "data": {"suite": "text", "inputs_per_task": 8},
    "start": ["default"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "halving",
    [
        pytest.param(None, marks=pytest.mark.long),
        pytest.param({"by": "steps", "first": 2}, marks=pytest.mark.slow),
    ],
    ids=["to the end", "halved"],
)
def test_a_learner_s_search_ends_with_the_adapter_its_trial_scored(
    recipe, ray_session, tmp_path, halving
):
    out = search(recipe, tmp_path, **LEARNED, trials=5, halving=halving)
    assert told(out)["validation"]["mean"] == told(out)["metrics"]["validation_mean"]
    assert read_json(out / "adapter" / "merge_report.json")["method"] == "nsc"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "ties", "layer_groups": 2, "search": {"layers.*.*": "uniform(0, 1)"}},
        {"method": "adamerging", "search": {"learn.start.value": "uniform(0.1, 0.5)"}},
        {"method": "regmean", "space": "default", "search": {}},
        {"method": "soup", "search": {"weights.*": "uniform(0, 1)"}, "start": ["uniform"]},
    ],
    ids=["layers", "heads", "grams", "weights"],
)
def test_whatever_it_needs_the_best_recipe_is_its_trial(recipe, ray_session, tmp_path, changes):
    data = {"suite": "text", "inputs_per_task": 8}
    learn = {"optimisation": {"steps": 3}} if changes["method"] == "adamerging" else {}
    changes = {"start": ["default"], **changes, "learn": learn, "data": data, "trials": 3}
    out = search(recipe, tmp_path, **changes)
    assert told(out)["validation"]["mean"] == told(out)["metrics"]["validation_mean"]
    again = yaml.safe_load((out / "best.yaml").read_text())
    again["output"]["path"] = str(tmp_path / "again")
    path = write_yaml(tmp_path / "again.yaml", again)
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(path)]) == 0
    assert hashes(tmp_path / "again") == hashes(out / "adapter")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data's own
def test_a_fusion_vae_is_searched_and_the_best_is_trained_with_deepspeed(
    recipe, classifiers, ray_session, tmp_path
):
    changes = {
        "method": "icm_fusion",
        "params": {"residual": False},
        "fusion": {"vae": {"hidden": 8}, "vae_steps": 8, "meta_steps": 2, "batch": 4},
        "trajectories": str(classifiers.parents[1] / "trajectories" / "shared-seed0"),
        "search": {"fusion.kl_weight": "loguniform(1e-5, 1)", "fusion.inner.steps": "int(1, 2)"},
        "objectives": ["validation_mean", "kl_total"],
        "data": {"suite": "text", "inputs_per_task": 8},
    }
    out = search(recipe, tmp_path, **changes, trials=4)
    rows = pq.read_table(out / "report" / "trials.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["complete"] * 4
    assert len({row["metrics.kl_total"] for row in rows}) == 4
    assert all(row["metrics.reconstruction_error"] > 0 for row in rows)
    load_recipe(TrainFusionRecipe, out / "best.train_fusion.yaml")
    report = read_json(out / "adapter" / "merge_report.json")
    assert report["method"] == "icm_fusion"
    assert (out / "report" / "index.html").read_text().count("<svg") >= 2
    # The trial's own loop and DeepSpeed's add in another order, so the last digits differ.
    scores = told(out)
    assert scores["validation"]["mean"] == pytest.approx(
        scores["metrics"]["validation_mean"], abs=0.1
    )


@pytest.mark.slow
def test_rows_and_seeds_make_a_table(recipe, ray_session, tmp_path):
    row = {"method": "task_arithmetic", "grid": {"params.scale": [0.2, 0.5]}}
    row["search"] = {"params.scale": "uniform(0.1, 0.9)"}
    rows = [row, {**copy.deepcopy(row), "method": "tsv"}]  # a recipe has no aliases
    out = search(recipe, tmp_path, search={}, rows=rows, seeds=[0, 1], trials=2, test=24)
    table = (out / "table.md").read_text()
    assert table.count("| task\\_arithmetic |") == table.count("| tsv |") == 1
    grid = trials(out / "tsv" / "grid")
    assert [t["point"] for t in grid] == [{"params.scale": 0.2}, {"params.scale": 0.5}]
    assert {p.parent.name for p in out.glob("*/*/best.yaml")} == {"grid", "seed0", "seed1"}


@pytest.mark.slow
def test_a_killed_driver_goes_on(recipe, ray_session, tmp_path):
    path = write(recipe, tmp_path, trials=300, start=[])
    words = [sys.executable, "-m", "jobs.search", "-c", str(path)]
    run_of = {"cwd": ROOT, "env": environment(), "stdout": subprocess.DEVNULL}
    driver = subprocess.Popen(words, stderr=subprocess.DEVNULL, **run_of)
    done = 0
    while done < 3:
        assert driver.poll() is None
        time.sleep(0.2)
        done = sum('"complete"' in p.read_text() for p in (tmp_path / "out").glob("trials/0*.json"))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {t["number"]: t for t in trials(tmp_path / "out") if t["state"] == "complete"}
    assert len(before) < 300
    assert (tmp_path / "out" / "best.yaml").is_file()
    assert run(path, f"trials={len(before) + 3}") == 0
    after = {t["number"]: t for t in trials(tmp_path / "out")}
    assert {number: after[number] for number in before} == before
    assert len(after) == len(before) + 3


@pytest.mark.cluster
def test_two_nodes_run_trials(tmp_path):
    tests = ROOT / "tests"
    command = [sys.executable, str(tests / "distributed" / "two_nodes_search.py")]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tests}"),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"nodes": 2, "states": ["complete"] * 8}
