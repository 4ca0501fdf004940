"""Pipelines, searches and evaluations of adapters that were trained elsewhere."""

import shutil

import pytest
import torch
from ray_samples import save_peft, write_yaml

from icm_ray.adapters import load_adapter
from icm_ray.config import EvaluateRecipe, LearnRecipe, PipelineRecipe, SearchRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import HEAD, ready_experts
from icm_ray.evaluation.heads import Head
from icm_ray.files import read_json, read_manifest
from icm_ray.merging.proof import verify_folder
from icm_ray.suites import find_suite
from icm_ray.workflows import evaluate, learn
from icm_ray.workflows.pipeline.adapters import check_ready
from icm_ray.workflows.pipeline.run import run
from icm_ray.workflows.pipeline.stages import check_rows
from icm_ray.workflows.search.run import run as search

# Said by Ray Data and DeepSpeed of themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SIZES = {"calibration": 8, "validation": 300, "test": 300}  # or random experts score 0
TASKS = ("keyword", "supersense")


@pytest.fixture
def refs(tiny_bert, tmp_path):
    """Two tasks' adapters as a stranger has them: plain PEFT folders, each with its head inside."""
    draw = torch.Generator().manual_seed(0)
    refs = []
    for seed, task in enumerate(TASKS):
        folder = save_peft(tiny_bert, tmp_path / task, seed)
        classes = find_suite("text").tasks[task].outputs
        Head(torch.randn(classes, 16, generator=draw), torch.zeros(classes)).save(folder / HEAD)
        refs.append({"name": task, "path": str(folder)})
    return refs


def recipe_with(tmp_path, **keys):
    plain = {"name": "x", "output": str(tmp_path / "out"), **keys}
    return load_recipe(PipelineRecipe, write_yaml(tmp_path / "r.yaml", plain))


def plain_of(refs, tiny_bert, **keys):
    resources = {"workers": 2, "cpus_per_worker": 0.5}
    return {
        "adapters": refs,
        "base": str(tiny_bert),
        "sizes": SIZES,
        "resources": resources,
        **keys,
    }


def test_what_does_not_go_with_ready_adapters_is_said_at_once(tmp_path):
    refs = [{"name": name, "path": f"somewhere/{name}"} for name in ("depth", "poems")]
    methods = [
        {"method": "regmean"},
        {"label": "wide", "method": "soup", "search": {"rank": "choice(1, 2)"}},
        {"label": "learns", "method": "nsc", "tasks": ["depth"], "search": {"params.x": [1]}},
    ]
    recipe = recipe_with(
        tmp_path, adapters=refs, methods=methods, training={"steps": 3}, budget={"minutes": 1}
    )
    with pytest.raises(RecipeError) as caught:
        check_rows(recipe)
    told = "\n".join(caught.value.problems)
    for words in (
        "training: would train",
        "methods.regmean: needs inputs of every adapter, and poems has no task",
        "budget: chooses among methods",
        "methods.wide: search.rank: a table searches",
        "methods.learns: search: nsc learns or trains first",
    ):
        assert words in told
    strangers = [{"name": "poems", "path": "somewhere"}]
    with pytest.raises(RecipeError, match="none is called as a task"):
        check_rows(recipe_with(tmp_path, adapters=strangers, methods=[{"method": "soup"}]))


def test_a_missing_head_is_said_before_ray_starts(refs, tmp_path, tiny_bert):
    (tmp_path / "keyword" / HEAD).unlink()
    recipe = recipe_with(tmp_path, **plain_of(refs, tiny_bert), methods=[{"method": "soup"}])
    with pytest.raises(RecipeError, match="adapters: keyword: no head"):
        check_ready(recipe)


def test_heads_lie_in_the_adapter_or_beside_it(refs, tmp_path):
    inside = tmp_path / "keyword"
    beside = shutil.copytree(inside, tmp_path / "trained" / "adapter")
    (beside / HEAD).rename(tmp_path / "trained" / HEAD)
    found = ready_experts([("b", beside), ("a", inside)])
    assert list(found) == ["a", "b"]
    assert [one.adapter for one in found.values()] == [inside, beside]
    assert all(one.head() is not None for one in found.values())


@pytest.mark.slow
def test_a_pipeline_without_methods_tries_what_the_data_allow(refs, tmp_path, tiny_bert, capsys):
    other = shutil.copytree(tmp_path / "keyword", tmp_path / "other")
    adapters = [*refs, {"name": "other", "path": str(other)}]
    recipe = recipe_with(tmp_path, **plain_of(adapters, tiny_bert), budget={"minutes": 0.1})
    found = run(recipe, tmp_path / "out")
    plan = read_json(tmp_path / "out" / "plan.json")
    assert plan["budget_seconds"] == 6
    seconds = dict(plan["seconds"])
    assert 0 < sum(seconds.values()) + plan["scoring"]["base and experts"] <= 6
    assert plan["scoring"].keys() - seconds.keys() == {"base and experts"}
    assert list(seconds.values()) == sorted(seconds.values())
    assert plan["left_out"]["distillation"] == "no inputs of other"
    assert "the budget" in plan["left_out"]["ties"]
    told = capsys.readouterr()
    assert f"plan: {len(seconds)} methods" in told.out
    assert "Merged and unproven, for want of a task: other." in told.out
    assert "other: no task of that name" in told.err
    assert "points of its own test score" in (tmp_path / "out/report/index.html").read_text()
    verify_folder(tmp_path / "out" / "adapter")
    best = found["choice"]
    assert best["method"] in seconds
    assert set(best["losses"]) == set(TASKS)
    # All three are merged, and only what was planned is there.
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert all(name in card for name in (*TASKS, "other"))
    merged = {path.name for path in (tmp_path / "out/merged/adapters").iterdir()}
    assert merged == set(seconds)
    before = (tmp_path / "out/plan.json").read_bytes()
    run(recipe, tmp_path / "out")
    assert (tmp_path / "out/plan.json").read_bytes() == before


@pytest.mark.slow
def test_a_table_may_search_and_train_with_deepspeed(refs, tmp_path, tiny_bert):
    methods = [
        {"method": "soup"},
        {"method": "task_arithmetic", "search": {"params.scale": "uniform(0.2, 0.6)"}, "trials": 3},
        {"method": "icm_fusion", "fusion": {"vae_steps": 3, "meta_steps": 1, "batch": 2}},
    ]
    plain = plain_of(refs, tiny_bert, methods=methods)
    recipe = recipe_with(tmp_path, **plain, engine={"checkpoint_every": 4})
    found = run(recipe, tmp_path / "out")
    assert any(name.endswith("task_arithmetic (tuned)") for name in found["scores"])
    trials = list((tmp_path / "out/search/adapters/task_arithmetic/trials").glob("*.json"))
    assert len(trials) == 3
    (model,) = (tmp_path / "out/fusion/adapters").iterdir()
    assert "optimizer_bytes" in read_json(model / "evidence.json")["report"]
    names = {path.name for path in (tmp_path / "out/merged/adapters/task_arithmetic").iterdir()}
    searched = [float(name.removeprefix("scale=")) for name in names - {"default"}]
    assert all(0.2 <= scale <= 0.6 for scale in searched)  # none, where the default is best


@pytest.mark.slow
def test_other_jobs_take_them_too(refs, tmp_path, tiny_bert):
    shared = {"base": str(tiny_bert), "resources": {"workers": 1, "cpus_per_worker": 0.5}}
    plain = {**shared, "suite": "text", "adapters": refs, "trials": 2, "validation": 300}
    plain |= {"search": {"params.scale": [0.3, 0.5]}, "output": str(tmp_path / "s")}
    search(load_recipe(SearchRecipe, write_yaml(tmp_path / "s.yaml", plain)), tmp_path / "s")
    read_manifest(tmp_path / "s" / "adapter")
    merged = [{"name": "best", "path": str(tmp_path / "s" / "adapter")}]
    plain = {**shared, "suite": "text", "experts": refs, "adapters": merged, "examples": 300}
    order = write_yaml(tmp_path / "e.yaml", {**plain, "output": str(tmp_path / "e")})
    scores = evaluate.run(load_recipe(EvaluateRecipe, order), tmp_path / "e")["scores"]
    assert set(scores["best"]["normalised"]) == set(TASKS)
    # distillation looks through heads, which lie with the adapters.
    how = {"optimisation": {"steps": 2, "batch": 4}, "start": {"residual": None, "value": 0.5}}
    plain = {**shared, "adapters": refs, "method": "distillation", "learn": how}
    plain |= {"data": {"suite": "text", "inputs_per_task": 8}, "output": str(tmp_path / "l")}
    learn.run(load_recipe(LearnRecipe, write_yaml(tmp_path / "l.yaml", plain)), tmp_path / "l")
    told = (tmp_path / "l" / "evidence.json").read_text()
    assert load_adapter(refs[0]["path"]).fingerprint in told
