"""`jobs.prepare`: a suite's base fetched once and checked, and what data the suite has."""

from pathlib import Path
from typing import Any

from icm_ray.config import PrepareRecipe
from icm_ray.errors import RecipeError
from icm_ray.merging.estimate import warn
from icm_ray.suites import SPLITS, find_suite, prepare_base
from icm_ray.workflows.prepared import cut_lines


def run(recipe: PrepareRecipe, target: Path) -> dict[str, Any]:
    """Prepare base and data; idempotent, and no network is used for what is there."""
    suite: Any = find_suite(recipe.suite) if recipe.suite is not None else None
    spec = recipe.base or (suite.base if suite else None)
    if spec is None:
        raise RecipeError("base: missing. Name a base or a suite.")
    path = prepare_base(spec, recipe.cache, recipe.revision, progress=print)
    print(f"base {spec}: {path}")
    counts = {}
    for task in suite.tasks if suite else ():
        sizes = counts[task] = {split: suite.count(task, split) for split in SPLITS}
        print(f"{task}: " + ", ".join(f"{n} {split}" for split, n in sizes.items()))
    if suite and not suite.is_packaged:
        warn(cut_lines(suite, path))
    target.mkdir(parents=True, exist_ok=True)
    return {"outputs": {"base": str(path), "examples": counts}}
