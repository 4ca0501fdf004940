"""Rows of random adapters: merged and scored as any row, and never counted as a merge."""

import pyarrow.parquet as pq
import pytest
import torch
from ray_samples import write_yaml

from icm_ray.adapters import load_adapter
from icm_ray.command import run_job
from icm_ray.config import EvaluateRecipe, PipelineRecipe
from icm_ray.distributed.heads import read_heads
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import find_experts
from icm_ray.files import RUN_FILE, read_json
from icm_ray.kinds import REALIGNED
from icm_ray.workflows.pipeline.stages import check_rows
from jobs.evaluate import work as evaluate_work
from jobs.pipeline import work

RECIPE = {
    "name": "tiny",
    "tasks": ["keyword", "supersense"],
    "lora": {"rank": 2, "alpha": 4, "targets": ["query"]},
    "training": {"steps": 4, "batch": 8, "train_examples": 64, "checkpoints": 1},
    "sizes": {"calibration": 8, "validation": 20, "test": 20},
    "resources": {"workers": 1, "cpus_per_worker": 1},
}


def rows(*changes):
    return [{"method": "soup", "random": True, **change} for change in changes]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"method": "regmean"}, r"methods\.regmean-random\.random: .* no inputs"),
        ({"method": "nsc"}, r"nsc-random\.random: .* no inputs"),
        ({"method": "soup", "metric": "inputs"}, "no inputs"),
        ({"random": False, "label": "x-random"}, "its end marks a control"),
        ({"random": False, "label": "x-heads-realigned"}, "its end marks a control"),
        ({"method": "task_arithmetic", "search": {"scale": "uniform(0, 1)"}}, "takes a grid"),
    ],
)
def test_what_random_adapters_cannot_do_is_said_first(row, line, tmp_path):
    recipe = PipelineRecipe(**RECIPE, output=str(tmp_path / "out"), methods=rows(row))
    with pytest.raises(RecipeError, match=line):
        check_rows(recipe)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"method": "soup"}, "again: soup reads no Gram statistics"),
        ({"method": "nsc"}, "again: nsc reads no Gram statistics"),
        ({"method": "regmean", "tasks": ["depth"]}, "the row names some"),
    ],
)
def test_what_reads_no_statistics_reads_none_again(row, line, tmp_path):
    rows = [{**row, "again": True}]
    recipe = PipelineRecipe(**RECIPE, output=str(tmp_path / "out"), methods=rows)
    with pytest.raises(RecipeError, match=line):
        check_rows(recipe)


def test_heads_that_are_not_there_are_not_realigned(tmp_path):
    changes = {"suite": "lm", "tasks": ["code", "email"], "lora": {"targets": ["q_proj"]}}
    recipe = PipelineRecipe(
        **{**RECIPE, **changes}, output=str(tmp_path), methods=rows({}), realign_heads=True
    )
    with pytest.raises(RecipeError, match="realign_heads: no task is read through a head"):
        check_rows(recipe)


@pytest.fixture(scope="module")
def out(tiny_bert, ray_session, tmp_path_factory):
    """A table with two controls and one merge, read through re-aligned heads too."""
    root = tmp_path_factory.mktemp("controls")
    grid = {"method": "task_arithmetic", "params": {"scale": 0.3}, "grid": {"scale": [0.5]}}
    content = {**RECIPE, "base": str(tiny_bert), "output": str(root / "out")}
    methods = [*rows({}, grid), {"method": "soup"}]
    path = write_yaml(root / "tiny.yaml", {**content, "methods": methods, "realign_heads": True})
    assert run_job(PipelineRecipe, work, "", ["-c", str(path)]) == 0
    return root / "out"


def test_a_control_stands_beside_the_references(out):
    scores = pq.read_table(out / "report" / "results.parquet").to_pylist()
    labels = {row["method"] for row in scores if row["split"] == "test"}
    twice = ("soup", "soup-random", "task_arithmetic-random", "base")
    assert labels == {*twice, *(f"{label}{REALIGNED}" for label in twice), "expert", "probe"}
    real = load_adapter(out / "experts" / "shared-seed0" / "keyword" / "adapter")
    drawn = load_adapter(out / "random" / "shared-seed0" / "keyword")
    for module, factors in real.modules.items():
        norm = float(factors.delta().norm())
        assert float(drawn.modules[module].delta().norm()) == pytest.approx(norm, rel=1e-3)
    # The adapter is of the one merge, though both controls come first and one was tuned.
    assert read_json(out / "adapter" / "merge_report.json")["method"] == "soup"
    told = read_json(out / "adapter" / RUN_FILE)["inputs"]
    assert all("/random/" not in path for path in told.values())
    lines = (out / "report" / "table.md").read_text().splitlines()
    merges = ["soup", "soup-heads-realigned"]
    shown = [line.split(" |")[0].strip("| ").replace("\\", "") for line in lines if "%" in line]
    assert sorted(shown[:2]) == merges
    assert shown[-3:] == ["expert", "probe", "base"]


def test_heads_are_written_for_a_merge_and_the_base(out):
    heads = out / "heads" / "shared-seed0"
    merge, base = (read_heads(heads / place) for place in ("soup/default", "base"))
    assert set(merge) == set(base) == set(RECIPE["tasks"])
    experts = find_experts(out / "experts" / "shared-seed0")
    for task, head in merge.items():
        assert head.weight.shape == experts[task].head().weight.shape
        assert not torch.equal(head.weight, base[task].weight)


def test_adapters_are_evaluated_through_realigned_heads(out, tiny_bert, tmp_path):
    recipe = {
        "experts": str(out / "experts" / "shared-seed0"),
        "base": str(tiny_bert),
        "adapters": [{"name": "merged", "path": str(out / "adapter")}],
        "examples": 20,
        "realign_heads": True,
        "resources": RECIPE["resources"],
        "output": str(tmp_path / "scores"),
    }
    path = write_yaml(tmp_path / "evaluate.yaml", recipe)
    assert run_job(EvaluateRecipe, evaluate_work, "", ["-c", str(path)]) == 0
    told = read_json(tmp_path / "scores" / "results.json")
    names = {"merged", f"merged{REALIGNED}", f"base{REALIGNED}", "base", "expert"}
    assert set(told["scores"]) == names
    merged = set(read_heads(tmp_path / "scores" / "heads" / "merged"))
    assert merged == set(RECIPE["tasks"])
