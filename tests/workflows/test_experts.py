"""Which experts are trained together, and that the committed ones are those of their recipes."""

from pathlib import Path

import pytest
import yaml
from ray_samples import ROOT, finetune_recipe

from icm_ray.adapters import open_adapter
from icm_ray.config import ExpertSet, FinetuneRecipe, PipelineRecipe
from icm_ray.errors import RecipeError
from icm_ray.files import read_manifest
from icm_ray.suites import SUITES, find_suite
from icm_ray.workflows.experts import expert_jobs, expert_key, groups_of, start_of

SIZES = {"stress": 16, "syllables": 16, "keyword": 24, "depth": 32, "supersense": 32, "year": 40}


def recipe_of(tiny_bert: Path, out: Path, tasks: list[str] | None, size: int) -> FinetuneRecipe:
    return finetune_recipe(tiny_bert, out, tasks=tasks, training={"tasks_per_forward": size})


def test_tasks_that_read_about_as_much_share_passes(tiny_bert: Path, tmp_path: Path) -> None:
    suite = SUITES["text"]
    assert {name: task.max_tokens for name, task in suite.tasks.items()} == SIZES
    alone = groups_of(recipe_of(tiny_bert, tmp_path, None, 1), suite)
    assert alone == [(name,) for name in SIZES]
    four = groups_of(recipe_of(tiny_bert, tmp_path, None, 4), suite)
    assert four == [tuple(SIZES)[:4], tuple(SIZES)[4:]]
    for order in (["year", "stress", "depth"], ["depth", "year", "stress"]):
        assert groups_of(recipe_of(tiny_bert, tmp_path, order, 2), suite) == [
            ("stress", "depth"),
            ("year",),
        ]


def test_an_expert_is_another_in_other_company(tiny_bert: Path, tmp_path: Path) -> None:
    def keys(tasks: list[str], size: int) -> dict[str, str]:
        recipe = recipe_of(tiny_bert, tmp_path, tasks, size)
        jobs = expert_jobs(recipe, SUITES["text"])
        return {task: expert_key(job, "b", "d", recipe) for (_, task), job in jobs.items()}

    alone = keys(["depth", "supersense", "year"], 1)
    two = keys(["depth", "supersense", "year"], 2)
    three = keys(["depth", "supersense", "year"], 3)
    assert two["year"] == alone["year"], "nobody is left for it"
    assert len({found["depth"] for found in (alone, two, three)}) == 3
    assert two == keys(["supersense", "year", "depth"], 2)


def test_a_start_must_fit_the_new_lora(tiny_bert: Path, tmp_path: Path) -> None:
    start = ROOT / "docs/results/text/experts/own-seed0/year/adapter"

    def recipe(**lora) -> FinetuneRecipe:
        shape = {"rank": 8, "targets": ["query", "key", "value", "attention.output.dense"]}
        return finetune_recipe(tiny_bert, tmp_path, lora={**shape, "start": str(start), **lora})

    assert start_of(recipe()).fingerprint == open_adapter(start).fingerprint
    assert start_of(recipe(start=None)) is None
    keys = {
        expert_key(
            expert_jobs(one, SUITES["text"])["shared-seed0", "depth"], "b", "d", one, start_of(one)
        )
        for one in (
            recipe(),
            recipe(start=None),
            recipe(start=str(start.parents[1] / "depth/adapter")),
        )
    }
    assert len(keys) == 3
    with pytest.raises(RecipeError) as found:
        start_of(recipe(rank=4, targets=["query", "value"]))
    assert [word in str(found.value) for word in ("rank 8", "output.rank=4", "Name them")] == [
        True
    ] * 3


@pytest.mark.parametrize("name", list(SUITES))
def test_committed_experts_are_their_recipes_own(name: str) -> None:
    """Otherwise their tables would train them again without a word."""
    file = ROOT / "configs" / "pipeline" / f"results_{name}.yaml"
    recipe = PipelineRecipe.model_validate(yaml.safe_load(file.read_text()))
    sets = [ExpertSet(init=init, seed=seed) for init in ("shared", "own") for seed in range(3)]
    recipe, suite = recipe.model_copy(update={"sets": sets}), find_suite(name)
    folders = {
        place: ROOT.joinpath("docs", "results", name, "experts", *place)
        for place in expert_jobs(recipe, suite)
    }
    there = {place: folder for place, folder in folders.items() if folder.is_dir()}
    assert len(there) >= len(suite.tasks)
    for place, folder in there.items():
        manifest = read_manifest(folder)
        data = suite.fingerprint(place[1])
        job = expert_jobs(recipe, suite)[place]
        assert manifest["key"] == expert_key(job, manifest["base"], data, recipe), folder
