"""One merge recipe, from the first check to the verified folder; the caller says who computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from icm_ray.adapters import AdapterFile, check_base, open_all
from icm_ray.adapters.base_folder import open_base, require_weights
from icm_ray.adapters.base_skeleton import base_warnings
from icm_ray.config import MergeRecipe
from icm_ray.evidence.tensors import given
from icm_ray.files import refuse_foreign, sha256_of
from icm_ray.merging.estimate import check_sources, warn, warnings_of
from icm_ray.merging.folder import write_merged
from icm_ray.merging.order import plan_merge
from icm_ray.suites import prepare_base
from icm_ray.types import MergeResult

Merger = Callable[[list[AdapterFile], dict[str, Any]], tuple[MergeResult, float]]
"""Merges open files, given params, evidence, output_rank and seed; returns result and seconds."""

Gatherer = Callable[[list[AdapterFile], Path], Path]
"""Runs the base in a folder on the recipe's data; returns the folder of evidence."""


def merge_recipe(
    recipe: MergeRecipe, target: Path, merger: Merger, gatherer: Gatherer | None = None
) -> dict[str, Any]:
    """Check everything, gather what the method needs, merge, write and verify; see `MergeRecipe`.

    Args:
        recipe: What to merge, and how.
        target: The output folder; appears whole or not at all.
        merger: The serial merge, or the one over Ray; both give the same bytes.
        gatherer: Gathers evidence from `data`; None where the base cannot be run.

    Raises:
        RecipeError: method, parameters, rank policy or what is named for evidence are wrong.
        InputError: adapters are broken, do not fit together or do not fit the base.
    """
    refuse_foreign(target)
    check_sources(recipe, can_gather=gatherer is not None)
    refs = [(ref.name, Path(ref.path)) for ref in recipe.adapters]
    files = open_all(refs, recipe.modules_to_save)
    evidence = Path(recipe.evidence) if recipe.evidence else None
    order = {"params": recipe.params, "output_rank": recipe.output.rank, "seed": recipe.seed}
    plan_merge(files, recipe.method, evidence=evidence, is_gathered_later=True, **order)
    prints = {file.name: file.fingerprint() for file in files}
    base = None
    if recipe.base:
        base = prepare_base(recipe.base, recipe.cache, recipe.revision, progress=print)
        opened = open_base(base)
        require_weights(opened)  # the result is verified on it in the end
        check_base(files, base)
        warn(base_warnings(opened))
    warn(warnings_of(files))
    if gatherer is not None and recipe.data is not None and base is not None:
        evidence = gatherer(files, base)
    told = given(evidence)
    order["evidence"] = told
    result, seconds = merger(files, order)
    checks = write_merged(
        result,
        target,
        key=sha256_of(
            [
                recipe.method,
                {**order, "evidence": told.identity if told else None},
                prints,
                recipe.output.dtype,
            ]
        ),
        inputs={name: str(path.absolute()) for name, path in refs},
        seconds=seconds,
        dtype=getattr(torch, recipe.output.dtype) if recipe.output.dtype else None,
        base=base,
        files=files,
        modules_to_save=recipe.modules_to_save,
        evidence=evidence,
    )
    print(
        f"{target}: {len(files)} adapters merged with {recipe.method} in {seconds:.2f} s, "
        f"rank {result.adapter.max_rank}, {result.report.retained_energy:.2%} of the energy "
        "kept, verified"
    )
    return {"outputs": {"adapter": str(target)}, "checks": checks}
