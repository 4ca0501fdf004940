"""`jobs.merge`: evidence if the method needs some, the merge on Ray, the verified folder."""

import shutil
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile
from icm_ray.config import MergeRecipe
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.evidence import grams_on_ray
from icm_ray.distributed.merge import merge_on_ray
from icm_ray.distributed.session import Session, opened
from icm_ray.errors import RecipeError
from icm_ray.evidence.gram_files import join_grams
from icm_ray.evidence.tensors import GRAMS, base_of, read_evidence
from icm_ray.learning.recipes import spec_of
from icm_ray.learning.tasks import experts_for, learner_data
from icm_ray.merging.order import MergeRequest
from icm_ray.merging.recipe import merge_recipe
from icm_ray.methods import find_method
from icm_ray.types import MergeResult
from icm_ray.workflows.learn import LearnRequest, learn_with_grams, refuse_form
from icm_ray.workflows.prepared import preparing


def run(recipe: MergeRecipe, target: Path) -> dict[str, Any]:
    """Merge on Ray and write the verified result; see `MergeRecipe`, which was checked before."""
    with ExitStack() as stack:  # checks come first; then one cluster for all stages

        def on_ray(files: list[AdapterFile], request: MergeRequest) -> tuple[MergeResult, float]:
            stack.enter_context(connected(recipe.resources))
            started = time.monotonic()
            result = merge_on_ray(files, request, recipe.resources)
            return result, time.monotonic() - started

        def gathered(files: list[AdapterFile], base: Path, ready: Path | None) -> Path:
            folder = target.with_name(f"{target.name}.evidence")
            if find_method(recipe.method).needs == "learned_merge":
                return _learned(recipe, files, base, folder, stack)
            return _grams(recipe, files, base, folder, ready, stack)

        return merge_recipe(recipe, target, on_ray, gathered)


def _learned(
    recipe: MergeRecipe, files: list[AdapterFile], base: Path, folder: Path, stack: ExitStack
) -> Path:
    """Return the folder of what the recipe's method learns from its data."""
    assert recipe.data is not None, "asked for by recipes with data alone"
    tasks = [file.name for file in files]
    spec = spec_of(recipe.method, recipe.learn)
    refuse_form(spec, recipe.resources)
    refs = [ref.pair for ref in recipe.adapters]
    experts = experts_for(spec.objective, None, recipe.data, refs)
    data = learner_data(recipe.data, tasks, [spec.objective], experts)
    request = LearnRequest(recipe.method, spec, files, data)
    session = stack.enter_context(_opened(recipe, base))
    return learn_with_grams(session, request, folder, recipe.method)


def _grams(
    recipe: MergeRecipe,
    files: list[AdapterFile],
    base: Path,
    folder: Path,
    ready: Path | None,
    stack: ExitStack,
) -> Path:
    """Return the folder of every adapter's Gram statistics; those that are ready are taken over."""
    assert recipe.data is not None, "asked for by recipes with data alone"
    kept = read_evidence(ready) if ready else None
    if kept and (kept.kind != GRAMS or not kept.adapters):
        raise RecipeError(
            "data, evidence: both named, but only Gram statistics of known adapters can be added "
            "to. Leave one out."
        )
    session = stack.enter_context(_opened(recipe, base))
    known = kept.adapters if kept and ready and base_of(ready) == session.key else {}
    missing = [file for file in files if known.get(file.name) != file.fingerprint]
    if ready and not missing:
        return ready
    modules = {module for file in files for module in file.shapes}
    if modules - {m for file in files if file not in missing for m in file.shapes}:
        missing, ready = files, None  # of what a new one alone adapts, all need statistics
    data = learner_data(recipe.data, [file.name for file in missing])
    new = folder.with_name(f"{folder.name}.new") if ready else folder
    with session.pool(len(missing)) as pool:
        grams_on_ray(pool, missing, data.inputs, new, modules=sorted(modules))
    if ready:
        join_grams([ready, new], folder, [file.name for file in files])
        shutil.rmtree(new)
    return folder


def _opened(recipe: MergeRecipe, base: Path) -> AbstractContextManager[Session]:
    return opened(recipe.resources, base, recipe.seed, preparing(recipe))
