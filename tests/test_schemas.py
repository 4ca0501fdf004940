"""The committed JSON Schemas are those of the code, and real files satisfy them."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from command_samples import recipe_of, save_lora
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from typer.testing import CliRunner

from icm_ray.cli import app
from icm_ray.command import run_job
from icm_ray.config import MergeRecipe
from icm_ray.suites import SUITES

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "schemas"


@pytest.fixture(scope="module")
def validators():
    found = {p.name.partition(".")[0]: json.loads(p.read_text()) for p in FOLDER.glob("*.json")}
    for schema in found.values():
        Draft202012Validator.check_schema(schema)
    return {name: Draft202012Validator(schema) for name, schema in found.items()}


@pytest.fixture
def recipe(tmp_path):
    folders = {"a": save_lora(tmp_path / "a", 1), "b": save_lora(tmp_path / "b", 2)}
    return recipe_of(tmp_path / "recipe.yaml", folders)


def test_generating_them_again_gives_the_same_bytes():
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = module.texts()
    assert sorted(texts) == sorted(path.name for path in FOLDER.glob("*.json"))
    for name, text in texts.items():
        said = "run python docs/schemas/generate.py"
        assert (FOLDER / name).read_text() == text, said


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_fits(validators, name):
    file = SUITES[name].folder / "suite.yaml"
    validators["suite"].validate(yaml.safe_load(file.read_text()))
    with pytest.raises(ValidationError):
        validators["suite"].validate({"tasks": {"a": {"kind": "poetry"}}})


def test_every_shipped_merge_recipe_fits(validators):
    paths = sorted((ROOT / "configs" / "merge").glob("*.yaml"))
    assert paths
    for path in paths:
        validators["merge_recipe"].validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("change", [{"methd": "x"}, {"seed": -1}, {"adapters": []}])
def test_a_wrong_recipe_does_not_fit(validators, recipe, change):
    plain = yaml.safe_load(recipe.read_text())
    validators["merge_recipe"].validate(plain)
    with pytest.raises(ValidationError):
        validators["merge_recipe"].validate({**plain, **change})


@pytest.mark.parametrize("words", [[], ["method=svd", "output.dtype=float16", "output.rank=1"]])
def test_a_real_report_fits(validators, recipe, words):
    assert CliRunner().invoke(app, ["merge", "-c", str(recipe), *words]).exit_code == 0
    report = json.loads((recipe.with_name("merged") / "merge_report.json").read_text())
    validators["merge_report"].validate(report)
    with pytest.raises(ValidationError):
        validators["merge_report"].validate({**report, "surprise": 1})


def test_results_of_success_and_failure_fit(validators, recipe, tmp_path):
    def work(_recipe, target):
        target.mkdir()
        return {"outputs": {"adapter": str(target)}, "scores": {}, "checks": {"modules": 4.0}}

    assert run_job(MergeRecipe, work, "", ["-c", str(recipe)]) == 0
    validators["results"].validate(json.loads((tmp_path / "merged" / "results.json").read_text()))

    def fail(_recipe, _target):
        raise OSError(5, "Input/output error")

    (tmp_path / "merged" / "results.json").unlink()
    (tmp_path / "merged").rmdir()
    assert run_job(MergeRecipe, fail, "", ["-c", str(recipe)]) == 1
    found = json.loads((tmp_path / "merged.results.json").read_text())
    validators["results"].validate(found)
    assert (found["status"], found["exit_code"]) == ("failed", 1)
