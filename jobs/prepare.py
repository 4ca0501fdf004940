"""Fetch a suite's base model once, check it, and show what data the suite has.

Run it with `python -m jobs.prepare -c configs/prepare/text.yaml [key=value ...]`.
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import PrepareRecipe
from icm_ray.errors import RecipeError
from icm_ray.suites import SPLITS, SUITES, prepare_base


def prepare(recipe: PrepareRecipe, target: Path) -> dict[str, Any]:
    """Prepare base and data; idempotent, and no network is used for what is there."""
    if recipe.suite is not None and recipe.suite not in SUITES:
        raise RecipeError(f"suite: {recipe.suite!r} but one of {', '.join(SUITES)} is expected.")
    suite = SUITES[recipe.suite] if recipe.suite else None
    spec = recipe.base or (suite.base if suite else None)
    if spec is None:
        raise RecipeError("base: missing. Name a base or a suite.")
    path = prepare_base(spec, recipe.cache, recipe.revision, progress=print)
    print(f"base {spec}: {path}")
    counts = {}
    if suite is not None:
        for task in suite.tasks:
            counts[task] = {split: len(suite.load(task, split)) for split in SPLITS}
    for task, sizes in counts.items():
        print(f"{task}: " + ", ".join(f"{n} {split}" for split, n in sizes.items()))
    target.mkdir(parents=True, exist_ok=True)
    return {"outputs": {"base": str(path), "examples": counts}}


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(PrepareRecipe, prepare, __doc__ or ""))
