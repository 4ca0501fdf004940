"""Merging and what it needs, from a checked recipe to a folder: evidence, learning, the merge."""

import contextlib
import time
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile
from icm_ray.config import MergeRecipe
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.merge import merge_on_ray
from icm_ray.distributed.shared_base import share_base
from icm_ray.learning.recipes import spec_of
from icm_ray.learning.tasks import EVIDENCE_BATCH, load_inputs
from icm_ray.merging.recipe import merge_recipe
from icm_ray.methods import find_method
from icm_ray.methods.table import LEARNED
from icm_ray.types import MergeResult
from icm_ray.workflows.evidence import _grams
from icm_ray.workflows.learn import _learned, readable_of


def merge_and_write(recipe: MergeRecipe, target: Path) -> dict[str, Any]:
    """Merge on Ray and write the verified result; see `MergeRecipe`."""
    with contextlib.ExitStack() as session:  # checks come first; then one cluster for all stages

        def on_ray(files: list[AdapterFile], order: dict[str, Any]) -> tuple[MergeResult, float]:
            session.enter_context(connected(recipe.resources))
            started = time.monotonic()
            result = merge_on_ray(files, recipe.method, resources=recipe.resources, **order)
            return result, time.monotonic() - started

        def gathered(files: list[AdapterFile], base: Path) -> Path:
            assert recipe.data is not None
            inputs = load_inputs(recipe.data, [file.name for file in files])
            folder = target.with_name(f"{target.name}.evidence")
            if find_method(recipe.method).needs == LEARNED:
                spec = spec_of(recipe.method, recipe.learn)
                readable = readable_of(None, recipe.data, spec, files)
                session.enter_context(connected(recipe.resources))
                return _learned(spec, files, inputs, readable, base, folder, recipe)
            session.enter_context(connected(recipe.resources))
            return _grams(files, inputs, share_base(base), folder, recipe, EVIDENCE_BATCH)

        return merge_recipe(recipe, target, on_ray, gathered)
