"""What `icm-ray plan` says of jobs that run a base, and that it is what they then do."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from ray_samples import ROOT, environment, write_yaml
from safetensors.torch import load_file

from icm_ray.config import EvidenceRecipe, LearnRecipe, PipelineRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.distributed.memory import Sampler
from icm_ray.evaluation.experts import HEAD
from icm_ray.evaluation.heads import Head
from icm_ray.evidence.tensors import TENSORS
from icm_ray.suites import find_suite
from icm_ray.workflows import evidence, learn
from icm_ray.workflows.pipeline.usual import NEVER
from icm_ray.workflows.plan import plan

STEPS = {"method": "nsc", "learn": {"optimisation": {"steps": 5}}}
DATA = {"suite": "text", "inputs_per_task": 12}


@pytest.fixture
def plain(tiny_bert, adapters, tmp_path):
    refs = []
    for name, (_, folder) in zip(("keyword", "supersense"), adapters[:2], strict=True):
        own = shutil.copytree(folder, tmp_path / name)
        classes = find_suite("text").tasks[name].outputs
        Head(torch.zeros(classes, 16), torch.zeros(classes)).save(own / HEAD)
        refs.append({"name": name, "path": str(own)})
    return {
        "base": str(tiny_bert),
        "adapters": refs,
        "data": DATA,
        "resources": {"workers": 1, "cpus_per_worker": 0.5},
        "output": str(tmp_path / "out"),
    }


def test_gram_statistics_take_what_the_plan_says(plain, tmp_path, ray_session):
    recipe = EvidenceRecipe(**plain, kind="gram_statistics")
    found = plan(recipe)
    assert list(found["seconds"]) == ["gram statistics"]
    assert (found["items"], found["workers"]) == (2, 1)
    assert not (tmp_path / "out").exists()
    evidence.run(recipe, tmp_path / "out")
    stored = sum(x.nbytes for x in load_file(tmp_path / "out" / TENSORS).values())
    assert stored <= found["gathered"] <= 4 * stored  # query, key and value share a Gram


def test_a_learner_is_planned_by_its_own_steps(plain):
    recipe = LearnRecipe(**plain, method="nsc", learn={"optimisation": {"steps": 7, "batch": 4}})
    found = plan(recipe)
    assert list(found["seconds"]) == ["losses before and after", "7 steps"]
    assert found["gathered"] == 0
    assert found["worker_bytes"] > 0
    assert found["total_seconds"] > sum(found["seconds"].values())
    started = LearnRecipe(**plain, method="row_space_match")
    found = plan(started)
    assert next(iter(found["seconds"])) == "gram statistics"
    assert found["gathered"] > 0


def test_a_pipeline_is_planned_within_its_budget(plain, cli, tmp_path):
    keys = {key: value for key, value in plain.items() if key != "data"}
    keys |= {"name": "x", "budget": {"minutes": 0.01}}
    recipe = write_yaml(tmp_path / "r.yaml", keys)
    code, out, _ = cli("plan", "pipeline", "-c", recipe, "--json")
    assert code == 0
    found = json.loads(out[out.index("{") :])
    assert next(iter(found["seconds"])) == "base and experts"
    assert len(found["seconds"]) >= 2, "the cheapest row is tried in any case"
    assert found["left_out"].keys() >= NEVER.keys()
    assert "the budget" in found["left_out"]["ties"]


def test_what_has_no_plan_is_said(cli, plain, tmp_path):
    recipe = write_yaml(tmp_path / "r.yaml", plain)
    code, _, err = cli("plan", "lern", "-c", recipe)
    assert code == 2
    assert "job: 'lern' has no plan" in err
    assert "learn" in err


def test_a_pipeline_that_trains_first_has_no_plan(tiny_bert, tmp_path):
    keys = {"name": "x", "base": str(tiny_bert), "output": str(tmp_path / "out")}
    recipe = write_yaml(tmp_path / "r.yaml", {**keys, "methods": [{"method": "soup"}]})
    with pytest.raises(Exception, match="experts are trained first"):
        plan(load_recipe(PipelineRecipe, recipe))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "run", "kind", "changes"),
    [
        ("evidence", evidence.run, EvidenceRecipe, {"kind": "gram_statistics", "batch": 32}),
        (
            "learn",
            learn.run,
            LearnRecipe,
            {"method": "nsc", "learn": {"optimisation": {"steps": 5}}},
        ),
    ],
)
def test_a_worker_takes_the_memory_that_was_planned(job, run, kind, changes, tmp_path, on_ray):
    experts = ROOT / "docs/results/text/experts/shared-seed0"
    keys = {
        "base": "minilm",
        "adapters": [
            {"name": task, "path": str(experts / task / "adapter")} for task in ("depth", "year")
        ],
        "data": {"suite": "text", "inputs_per_task": 64},
        "resources": {"workers": 1},
        "output": str(tmp_path / "out"),
        **changes,
    }
    recipe = write_yaml(tmp_path / "r.yaml", keys)
    done = subprocess.run(
        [sys.executable, "-m", "icm_ray", "plan", job, "-c", str(recipe), "--json"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    planned = json.loads(done.stdout[done.stdout.index("{") :])
    with Sampler() as sampler:
        run(load_recipe(kind, recipe), tmp_path / "out")
    used = sampler.peak - sampler.driver
    expected = planned["worker_bytes"] + planned["shared_bytes"]
    print(f"{job}: planned {expected / 1e6:.0f} MB, used {used / 1e6:.0f} MB")
    assert expected / 1.5 <= used <= 1.5 * expected
