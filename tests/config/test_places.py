"""What other jobs wrote is found where they wrote it."""

from pathlib import Path

import pytest

from icm_ray.config import (
    EvaluateRecipe,
    FinetuneRecipe,
    LearnRecipe,
    MergeRecipe,
    PipelineRecipe,
    SearchRecipe,
    TrainFusionRecipe,
)
from icm_ray.config.loading import load_recipe
from icm_ray.config.places import STORAGE_VARIABLE, earlier_output

COMMON = {"base": "minilm", "data": {"suite": "text"}, "output": "runs/out"}
REFS = [{"name": "a", "path": "runs/one/a"}, {"name": "b", "path": "runs/elsewhere/b"}]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    for place in ("root/runs/one/a", "root/runs/two", "runs/elsewhere/b", "runs/out"):
        (tmp_path / place).mkdir(parents=True)
    return tmp_path / "root"


def test_an_output_is_looked_for_under_the_root_first(root, monkeypatch) -> None:
    assert earlier_output(str(root), "runs/two") == str(root / "runs/two")
    assert earlier_output(str(root), "runs/elsewhere/b") == "runs/elsewhere/b"
    assert earlier_output(None, "runs/two") == "runs/two"
    assert earlier_output("s3://bucket", "runs/two") == "runs/two"
    monkeypatch.setenv(STORAGE_VARIABLE, str(root))
    assert earlier_output(None, "runs/two") == str(root / "runs/two")


@pytest.mark.parametrize(
    ("kind", "fields", "more"),
    [
        (MergeRecipe, ["evidence"], {"method": "soup"}),
        (LearnRecipe, ["heads", "fusion"], {"method": "nsc"}),
        (TrainFusionRecipe, ["heads", "joins", "trajectories"], {}),
        (SearchRecipe, ["experts", "trajectories"], {"method": "soup", "search": {}}),
        (EvaluateRecipe, ["experts"], {"base": None, "data": None}),
        (PipelineRecipe, ["experts"], {"name": "x", "base": None, "data": None}),
    ],
)
def test_every_job_finds_what_others_wrote(kind, fields: list[str], more: dict, root) -> None:
    values = {**COMMON, "adapters": REFS, "storage": str(root), **more}
    values = {key: value for key, value in values.items() if value is not None}
    recipe = load_recipe(kind, {**values, **dict.fromkeys(fields, "runs/two")})
    assert [getattr(recipe, field) for field in fields] == [str(root / "runs/two")] * len(fields)
    found = [ref.path for ref in recipe.adapters]
    assert found == [str(root / "runs/one/a"), "runs/elsewhere/b"]
    assert recipe.output_path == "runs/out", "what a job writes stays as it is written"


def test_parts_of_a_recipe_are_looked_through(root) -> None:
    values = {"lora": {"start": "runs/two"}, "output": "runs/out", "storage": str(root)}
    assert load_recipe(FinetuneRecipe, values).lora.start == str(root / "runs/two")


def test_what_nobody_set_stays_unset(root) -> None:
    values = {"name": "x", "adapters": REFS, "output": "runs/out", "storage": str(root)}
    recipe = load_recipe(PipelineRecipe, values)
    assert recipe.model_fields_set == values.keys()
    assert recipe.adapters[0].model_fields_set == {"name", "path"}
