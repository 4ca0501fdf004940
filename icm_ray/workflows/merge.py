"""`jobs.merge`: evidence if the method needs some, the merge on Ray, the verified folder."""

import contextlib
import time
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile
from icm_ray.config import MergeRecipe
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.evidence import grams_on_ray
from icm_ray.distributed.merge import merge_on_ray
from icm_ray.distributed.session import opened
from icm_ray.learning.recipes import spec_of
from icm_ray.learning.tasks import experts_for, learner_data
from icm_ray.merging.order import MergeRequest
from icm_ray.merging.recipe import merge_recipe
from icm_ray.methods import find_method
from icm_ray.types import MergeResult
from icm_ray.workflows.learn import LearnRequest, learn_with_grams
from icm_ray.workflows.prepared import fetching


def run(recipe: MergeRecipe, target: Path) -> dict[str, Any]:
    """Merge on Ray and write the verified result; see `MergeRecipe`."""
    with contextlib.ExitStack() as stack:  # checks come first; then one cluster for all stages

        def on_ray(files: list[AdapterFile], request: MergeRequest) -> tuple[MergeResult, float]:
            stack.enter_context(connected(recipe.resources))
            started = time.monotonic()
            result = merge_on_ray(files, request, recipe.resources)
            return result, time.monotonic() - started

        def gathered(files: list[AdapterFile], base: Path) -> Path:
            return _gathered(recipe, files, base, target, stack)

        return merge_recipe(recipe, target, on_ray, gathered)


def _gathered(
    recipe: MergeRecipe,
    files: list[AdapterFile],
    base: Path,
    target: Path,
    stack: contextlib.ExitStack,
) -> Path:
    """Return the folder of the evidence that the recipe's method needs, made from its data."""
    assert recipe.data is not None, "asked for by recipes with data alone"
    folder = target.with_name(f"{target.name}.evidence")
    tasks = [file.name for file in files]
    prepare = fetching(recipe)
    if find_method(recipe.method).needs == "learned_merge":
        spec = spec_of(recipe.method, recipe.learn)
        refs = [ref.pair for ref in recipe.adapters]
        experts = experts_for(spec.objective, None, recipe.data, refs)
        data = learner_data(recipe.data, tasks, [spec.objective], experts)
        request = LearnRequest(recipe.method, spec, files, data)
        session = stack.enter_context(opened(recipe.resources, base, recipe.seed, prepare))
        return learn_with_grams(session, request, folder, recipe.method)
    data = learner_data(recipe.data, tasks)
    session = stack.enter_context(opened(recipe.resources, base, recipe.seed, prepare))
    with session.pool(len(files)) as pool:
        return grams_on_ray(pool, files, data.inputs, folder)
