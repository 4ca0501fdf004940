"""Jobs around experts: trained, scored and looked at."""

import json

import pytest
from ray_samples import finetune_recipe, write_yaml

from icm_ray.adapters import load_adapter
from icm_ray.command import run_job
from icm_ray.config import EvaluateRecipe, EvidenceRecipe
from icm_ray.evaluation.experts import find_experts
from icm_ray.evidence.store import load_evidence
from icm_ray.files import read_json, read_manifest

SET = "shared-seed0"
TASKS = ("depth", "supersense")


@pytest.mark.slow
def test_the_evidence_job(experts, tiny_bert, tmp_path):
    from jobs.evidence import work

    refs = [{"name": t, "path": str(experts / "experts" / SET / t / "adapter")} for t in TASKS]
    plain = {
        "base": str(tiny_bert),
        "adapters": refs,
        "data": {"suite": "text", "inputs_per_task": 12},
        "resources": {"cpus_per_worker": 0.5, "workers": 1},
        "output": str(tmp_path / "evidence"),
    }
    recipe = write_yaml(tmp_path / "evidence.yaml", plain)
    assert run_job(EvidenceRecipe, work, "", ["-c", str(recipe)]) == 0
    prints = {ref["name"]: load_adapter(ref["path"]).fingerprint for ref in refs}
    vectors, ratios = load_evidence(tmp_path / "evidence", prints)
    assert set(vectors.vectors) == set(TASKS)
    # A of rank 2 sees little of 16 dimensions.
    assert all(0.3 < v < 1 for rows in ratios.expert.values() for v in rows.values())
    found = read_json(tmp_path / "evidence" / "results.json")
    assert found["status"] == "done"
    assert set(found["task_vector_norms"]) == set(TASKS)


@pytest.mark.slow
def test_the_evaluate_job(experts, tiny_bert, tmp_path, capsys):
    from jobs.evaluate import work

    folder = experts / "experts" / SET
    plain = {
        "experts": str(folder),
        "base": str(tiny_bert),
        "adapters": [{"name": "own", "path": str(folder / "depth" / "adapter")}],
        "examples": 30,
        "resources": {"cpus_per_worker": 0.5, "workers": 1},
        "output": str(tmp_path / "scores"),
    }
    recipe = write_yaml(tmp_path / "evaluate.yaml", plain)
    assert run_job(EvaluateRecipe, work, "", ["-c", str(recipe)]) == 0
    scores = read_json(tmp_path / "scores" / "results.json")["scores"]
    assert set(scores) == {"expert", "base", "own"}
    assert set(find_experts(folder)) == set(TASKS)
    # The expert of a task scores on it what the expert scores.
    assert scores["own"]["score"]["depth"] == scores["expert"]["depth"]
    low, high = scores["own"]["interval"]["supersense"]
    assert low <= scores["own"]["score"]["supersense"] <= high
    assert "NaN" not in (tmp_path / "scores" / "results.json").read_text()
    plain["adapters"][0]["name"] = "base"
    recipe = write_yaml(tmp_path / "clash.yaml", plain)
    assert run_job(EvaluateRecipe, work, "", ["-c", str(recipe)]) == 2
    assert "a reference. Choose another name" in capsys.readouterr().err


@pytest.mark.slow
def test_the_finetune_job_reports_experts_without_any_merge(tiny_bert, tmp_path):
    from icm_ray.config import FinetuneRecipe
    from jobs.finetune import work

    recipe = finetune_recipe(
        tiny_bert,
        tmp_path / "out",
        lora={"rank": 2},
        training={"steps": 3, "batch": 8, "train_examples": 48, "tasks_per_forward": 2},
        resources={"workers": 1},
    )
    plain = json.loads(recipe.model_dump_json(exclude_defaults=True))
    path = write_yaml(tmp_path / "finetune.yaml", plain)
    assert run_job(FinetuneRecipe, work, "", ["-c", str(path)]) == 0
    found = read_json(tmp_path / "out" / "results.json")
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    assert "adapter" not in found["outputs"]
    assert any(name.endswith("/expert") for name in found["scores"])
    for task in TASKS:
        folder = tmp_path / "out" / "experts" / SET / task
        assert read_manifest(folder)["together"] == list(TASKS)
        assert load_adapter(folder / "adapter").config["target_modules"] == ["query", "value"]
