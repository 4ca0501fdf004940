"""Rows of random adapters: merged and scored as any row, and never counted as a merge."""

import pyarrow.parquet as pq
import pytest
from ray_samples import write_yaml

from icm_ray.adapters import load_adapter
from icm_ray.command import run_job
from icm_ray.config import PipelineRecipe
from icm_ray.errors import RecipeError
from icm_ray.files import RUN_FILE, read_json
from icm_ray.workflows.pipeline.stages import check_rows
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
        ({"random": False, "label": "x-random"}, "'-random' marks a control"),
        ({"method": "task_arithmetic", "search": {"scale": "uniform(0, 1)"}}, "takes a grid"),
    ],
)
def test_what_random_adapters_cannot_do_is_said_first(row, line, tmp_path):
    recipe = PipelineRecipe(**RECIPE, output=str(tmp_path / "out"), methods=rows(row))
    with pytest.raises(RecipeError, match=line):
        check_rows(recipe)


def test_a_control_stands_beside_the_references(tiny_bert, ray_session, tmp_path):
    grid = {"method": "task_arithmetic", "params": {"scale": 0.3}, "grid": {"scale": [0.5]}}
    methods = [*rows({}, grid), {"method": "soup"}]
    content = {**RECIPE, "base": str(tiny_bert), "output": str(tmp_path / "out")}
    path = write_yaml(tmp_path / "tiny.yaml", {**content, "methods": methods})
    assert run_job(PipelineRecipe, work, "", ["-c", str(path)]) == 0
    out = tmp_path / "out"
    scores = pq.read_table(out / "report" / "results.parquet").to_pylist()
    labels = {row["method"] for row in scores if row["split"] == "test"}
    assert labels == {"soup", "soup-random", "task_arithmetic-random", "expert", "probe", "base"}
    real = load_adapter(out / "experts" / "shared-seed0" / "keyword" / "adapter")
    drawn = load_adapter(out / "random" / "shared-seed0" / "keyword")
    for module, factors in real.modules.items():
        assert float(drawn.modules[module].delta().norm()) == pytest.approx(
            float(factors.delta().norm()), rel=1e-3
        )
    # The adapter is of the one merge, though both controls come first and one was tuned.
    assert read_json(out / "adapter" / "merge_report.json")["method"] == "soup"
    told = read_json(out / "adapter" / RUN_FILE)["inputs"]
    assert all("/random/" not in path for path in told.values())
    table = (out / "report" / "table.md").read_text()
    assert table.index("| soup |") < table.index("soup-random") < table.index("| expert |")
