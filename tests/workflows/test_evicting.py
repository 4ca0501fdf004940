"""A task whose workers die each time: named and refused, or left out while the others go on."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_jobs import SMALL, of_stage, recipe_on, save_base
from ray_samples import finetune_recipe, hashes
from safetensors.torch import load_file

from icm_ray.adapters import AdapterFile, opening
from icm_ray.command import run_recipe
from icm_ray.config import MergeRecipe, PipelineRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.distributed.faults import LostWork
from icm_ray.errors import RecipeError
from icm_ray.evidence.tensors import TENSORS
from icm_ray.files import read_json
from icm_ray.jobs import JOBS
from icm_ray.types import LoRAFactors
from icm_ray.workflows.evicting import evicting, without_adapters
from icm_ray.workflows.pipeline.evicted import gone, without_tasks
from icm_ray.workflows.pipeline.stages import check_rows

OWN_RAY = True


def recipe_of(kind, tmp_path, how="evict", **keys):
    adapters = [{"name": name, "path": f"/{name}"} for name in "abc"]
    plain = {"base": "b", "adapters": adapters, "data": {"suite": "text"}}
    plain |= {"resources": {"on_broken_task": how}, "output": str(tmp_path / "out")}
    return kind.model_validate({**plain, **keys})


def dying_of(*bad):
    """Return a job that loses what is bad as long as it is in its recipe."""

    def run(recipe, evicted):
        present = [ref.name for ref in recipe.adapters if ref.name in bad]
        if present:
            error = LostWork("work was lost")
            error.lost = dict.fromkeys(present[:1], "died")
            raise error
        return {"outputs": {"left": [ref.name for ref in recipe.adapters], "told": dict(evicted)}}

    return run


def test_the_others_go_on_and_all_that_was_evicted_is_named(tmp_path, capsys):
    recipe = recipe_of(JOBS["evidence"].kind, tmp_path)
    found = evicting(recipe, without_adapters, dying_of("a", "c"))
    died = {"a": "died", "c": "died"}
    assert found == {"outputs": {"left": ["b"], "told": died}, "evicted": died}
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == [f"warning: {t}: evicted, died. The others went on." for t in "ac"]


def test_nothing_is_evicted_from_a_run_that_loses_nothing(tmp_path):
    recipe = recipe_of(JOBS["evidence"].kind, tmp_path)
    assert "evicted" not in evicting(recipe, without_adapters, dying_of())


@pytest.mark.parametrize(("how", "bad"), [("refuse", "a"), ("evict", "abc")])
def test_what_is_refused_or_leaves_nothing_ends_the_job(tmp_path, how, bad):
    recipe = recipe_of(JOBS["evidence"].kind, tmp_path, how)
    with pytest.raises(LostWork, match="work was lost"):
        evicting(recipe, without_adapters, dying_of(*bad))


def test_what_is_no_task_s_own_ends_the_job(tmp_path):
    def run(_recipe, _evicted):
        error = LostWork("work was lost")
        error.lost = {("a", 3): "died"}
        raise error

    with pytest.raises(LostWork):
        evicting(recipe_of(JOBS["evidence"].kind, tmp_path), without_adapters, run)


def test_a_job_that_cannot_go_on_says_so(tmp_path):
    plain = recipe_of(JOBS["evidence"].kind, tmp_path).model_dump(include={"adapters", "resources"})
    with pytest.raises(RecipeError, match="on_broken_task: this job cannot go on without a task"):
        load_recipe(MergeRecipe, {**plain, "method": "svd", "output": "out"}, [])


def test_rows_of_a_pipeline_go_on_with_the_tasks_that_are_left(tmp_path):
    plain = finetune_recipe(tmp_path, tmp_path / "out").model_dump(exclude_defaults=True)
    rows = [
        {"method": "soup"},
        {"method": "svd", "tasks": ["depth", "supersense"]},
        {"method": "ties", "tasks": ["depth"]},
    ]
    recipe = PipelineRecipe.model_validate({**plain, "name": "rows", "methods": rows})
    left = without_tasks(recipe, {"depth"})
    assert left.tasks == ["supersense"]
    assert [(row.method, row.tasks) for row in left.methods] == [
        ("soup", None),
        ("svd", ["supersense"]),
    ]
    assert without_tasks(recipe, {"other"}) is None
    assert without_tasks(recipe, {"depth", "supersense"}) is None


def test_rows_that_name_an_evicted_task_go_on_without_it_and_say_so(tmp_path):
    plain = finetune_recipe(tmp_path, tmp_path / "out").model_dump(exclude_defaults=True)
    plain |= {"name": "rows", "tasks": ["depth", "keyword", "year"]}
    roles = {"target": "keyword", "a": "depth", "b": "year"}
    rows = [
        {"method": "soup", "params": {"weights": {"depth": 1.0, "keyword": 2.0, "year": 3.0}}},
        {"method": "svd", "tasks": ["year", "depth"], "params": {"weights": [1.0, 3.0]}},
        {"method": "ties", "search": {"weights.depth": [0.5], "params.density": [0.1]}},
        {"method": "negate_add", "params": roles},
        {"method": "cat", "tasks": ["keyword", "year"], "params": {"weights": [1.0, 2.0]}},
        {"method": "linear", "tasks": ["depth"]},
    ]
    recipe = PipelineRecipe.model_validate({**plain, "methods": rows})
    left = without_tasks(recipe, {"depth"})
    assert [(row.method, row.params.get("weights"), row.search) for row in left.methods] == [
        ("soup", {"keyword": 2.0, "year": 3.0}, {}),
        ("svd", [3.0], {}),
        ("ties", None, {"params.density": [0.1]}),
        ("cat", [1.0, 2.0], {}),
    ]
    check_rows(left)
    lost = gone(recipe, {"depth": "died"})
    assert lost.notes == [
        "depth: evicted, died. The others went on.",
        *(f"methods.{m}: goes on without the weight of depth." for m in ("soup", "svd", "ties")),
        "methods.negate_add: left out, since its a was depth.",
        "methods.linear: left out, since none of its tasks is left.",
    ]
    assert lost.from_row("soup") == {"depth": "died"}
    assert lost.from_row("cat") == {}


def deadly(open_adapter, name):
    """Return what opens adapters, one of which no process but this one survives."""
    driver = os.getpid()

    class Factors(LoRAFactors):
        def __getattribute__(self, key):
            if key == "a" and os.getpid() != driver:
                os._exit(3)
            return super().__getattribute__(key)

    class File(AdapterFile):
        def load(self):
            if os.getpid() != driver:
                os._exit(3)
            adapter = super().load()
            modules = {m: Factors(f.a, f.b, f.scaling) for m, f in adapter.modules.items()}
            return replace(adapter, modules=modules)

    def opened(path, own=None, **how):
        file = open_adapter(path, own, **how)
        if file.name != name:
            return file
        return File(**{key: vars(file)[key] for key in file.__dataclass_fields__})

    return opened


@pytest.fixture(scope="module")
def shared(tiny_bert, tmp_path_factory):
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("evicting")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, eos_token="[SEP]")
    return recipe_on(save_base(root / "base", tokenizer, SMALL), root, SMALL)


def run(job, recipe):
    """Run a job in this process and return its results."""
    assert run_recipe(JOBS[job].kind, JOBS[job], recipe, [], debug=True) == 0
    return read_json(Path(recipe["output"]) / "results.json")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["evidence", "scores", "pipeline"])
def test_a_broken_adapter_is_as_one_left_out(stage, shared, ray_session, tmp_path, monkeypatch):
    def asked(output, without=()):
        some = [ref for ref in shared["adapters"] if ref["name"] not in without]
        if stage == "pipeline":
            plain = {"base": shared["base"], "suite": shared["data"]["suite"], "adapters": some}
            more = {"name": "one", "tasks": [ref["name"] for ref in some]}
            plain |= {**more, "methods": [{"method": "soup"}], "resources": shared["resources"]}
            return "pipeline", {**plain, "output": str(output)}
        return of_stage(stage, {**shared, "adapters": some}, output)

    job, recipe = asked(tmp_path / "without", ["fish"])
    expected = run(job, recipe)
    job, recipe = asked(tmp_path / "evicted")
    recipe["resources"] = {**recipe["resources"], "on_broken_task": "evict"}
    monkeypatch.setattr(opening, "open_adapter", deadly(opening.open_adapter, "fish"))
    found = run(job, recipe)
    assert list(found["evicted"]) == ["fish"]
    assert found["evicted"]["fish"].startswith("its workers died 4 times (")
    if stage == "evidence":
        assert hashes(tmp_path / "evicted") == hashes(tmp_path / "without")
    elif job == "learn":
        ours, theirs = (load_file(tmp_path / n / TENSORS) for n in ("evicted", "without"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    else:
        assert found["scores"] == expected["scores"]
    if stage == "pipeline":
        adapter = tmp_path / "evicted" / "adapter"
        assert "- fish: its workers died 4 times (" in (adapter / "README.md").read_text()
        assert list(read_json(adapter / "merge_report.json")["evicted"]) == ["fish"]
        (row,) = (tmp_path / "evicted" / "merged").glob("*/soup/default")
        assert "- fish: its workers died 4 times (" in (row / "README.md").read_text()
        assert "fish: evicted" in (tmp_path / "evicted" / "report" / "index.html").read_text()
