"""A setting as recipes that run: of jobs.merge, and of jobs.learn where heads are read."""

from pathlib import Path
from typing import Any

import yaml

from icm_ray.config import (
    AdapterRef,
    LearnRecipe,
    MergeRecipe,
    Recipe,
    SearchRecipe,
    TrainFusionRecipe,
)
from icm_ray.learning.objectives import reads_heads
from icm_ray.learning.recipes import spec_of
from icm_ray.methods import find_method
from icm_ray.search.spaces import Setting

BEST = "best.yaml"
MERGED, EVIDENCE = "adapter", "adapter.evidence"


def is_learned_apart(setting: Setting) -> bool:
    """Say whether jobs.learn has to run first: jobs.merge knows of no heads."""
    return setting.learns and reads_heads(spec_of(setting.method, setting.learn).objective)


def merge_recipe(setting: Setting, recipe: SearchRecipe, adapters: list[AdapterRef]) -> MergeRecipe:
    """Return the recipe of jobs.merge that makes exactly a trial's merge.

    Its output is `adapter` in the search's own folder, where the search puts the same bytes.
    """
    needs = find_method(setting.method).needs
    ready = is_learned_apart(setting) or setting.fuses
    fields: dict[str, Any] = {
        **_shared(recipe),
        "base": recipe.base,
        "adapters": adapters,
        "method": setting.method,
        "params": dict(setting.params),
        "output": {"path": f"{recipe.output}/{MERGED}", "rank": setting.rank},
    }
    if ready:
        fields["evidence"] = f"{recipe.output}/{EVIDENCE}"
    elif needs:
        fields["data"] = recipe.data
        fields["learn"] = {part: dict(v) for part, v in setting.learn.items()}
    return MergeRecipe.model_validate(_plain(fields))


def learn_recipe(setting: Setting, recipe: SearchRecipe, adapters: list[AdapterRef]) -> LearnRecipe:
    """Return the recipe of jobs.learn that makes the evidence of `merge_recipe`."""
    fields = {
        **_shared(recipe),
        "base": recipe.base,
        "adapters": adapters,
        "method": setting.method,
        "learn": {part: dict(v) for part, v in setting.learn.items()},
        "data": recipe.data,
        "heads": recipe.experts,
        "output": f"{recipe.output}/{EVIDENCE}",
    }
    return LearnRecipe.model_validate(_plain(fields))


def fusion_recipe(
    setting: Setting, recipe: SearchRecipe, adapters: list[AdapterRef]
) -> TrainFusionRecipe:
    """Return the recipe of jobs.train_fusion that makes the Fusion-VAE of `merge_recipe`."""
    fields = {
        **_shared(recipe),
        "base": recipe.base,
        "adapters": adapters,
        "trajectories": recipe.trajectories,
        "fusion": dict(setting.fusion),
        "data": recipe.data,
        "heads": recipe.experts,
        "output": f"{recipe.output}/{EVIDENCE}",
    }
    return TrainFusionRecipe.model_validate(_plain(fields))


def write_recipe(path: Path, recipe: Recipe, note: str) -> None:
    """Write a recipe as YAML with a first line on what it is, whole or not at all."""
    content = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(f"# {note}\n{content}", encoding="utf-8")
    temporary.replace(path)


def _shared(recipe: SearchRecipe) -> dict[str, Any]:
    names = ("storage", "resources", "seed", "cache", "revision", "modules_to_save", "allow_code")
    return {name: getattr(recipe, name) for name in names}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return value.model_dump() if hasattr(value, "model_dump") else value

    return {name: plain(value) for name, value in fields.items() if value is not None}
