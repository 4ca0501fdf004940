"""One merge recipe, from the first check to the verified folder; the caller says who computes."""

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from icm_ray.adapters import AdapterFile, fit_base
from icm_ray.adapters.base_folder import open_base, require_weights
from icm_ray.checkpoint import scratch_place
from icm_ray.config import MergeRecipe
from icm_ray.devices import find_device
from icm_ray.errors import RecipeError, counted
from icm_ray.evidence.tensors import as_evidence
from icm_ray.files import refuse_foreign, refuse_inputs, sha256_of
from icm_ray.merging.cut import kept_line, loss_lines
from icm_ray.merging.estimate import warn, warnings_of
from icm_ray.merging.folder import Origin, write_merged
from icm_ray.merging.kept import Kept, merge_kept
from icm_ray.merging.order import MergeRequest, idle_lines, plan_merge
from icm_ray.merging.sources import open_inputs, sources_of
from icm_ray.suites import prepare_base
from icm_ray.types import MergeResult

Merger = Callable[[list[AdapterFile], MergeRequest], tuple[MergeResult, float]]
"""Merges open files as asked; returns result and seconds."""

Gatherer = Callable[[list[AdapterFile], Path, Path | None], Path]
"""Runs the base in a folder on the recipe's data, for what the evidence at hand lacks; returns the
folder of evidence."""


def merge_recipe(
    recipe: MergeRecipe, target: Path, merger: Merger, gatherer: Gatherer | None = None
) -> dict[str, Any]:
    """Check everything, gather what the method needs, merge, write and verify; see `MergeRecipe`.

    Args:
        recipe: What to merge, and how; it has passed `check_sources`.
        target: The output folder; appears whole or not at all.
        merger: The serial merge, or the one over Ray; both give the same bytes.
        gatherer: Gathers evidence from `data`; None where the base cannot be run.

    Raises:
        RecipeError: method, parameters, rank policy or what is named for evidence are wrong.
        InputError: adapters are broken, do not fit together or do not fit the base.
    """
    refuse_inputs(target, sources_of(recipe))
    refuse_foreign(target)
    refuse_unused(recipe)
    files = open_inputs(recipe)
    request = MergeRequest.of(recipe)
    checked = plan_merge(files, request, is_gathered_later=True)
    base = opened = None
    if recipe.base:
        base = prepare_base(recipe.base, recipe.cache, recipe.revision, progress=print)
        opened = open_base(base)
        require_weights(opened)  # the result is verified on it in the end
        files = fit_base(files, opened)
    warn([*warnings_of(files, opened), *idle_lines(checked)])
    evidence = Path(recipe.evidence) if recipe.evidence else None
    if gatherer is not None and recipe.data is not None and base is not None:
        evidence = gatherer(files, base, evidence)
    request = replace(request, evidence=as_evidence(evidence))  # opened and hashed once
    result, seconds = merger(files, request)
    warn(loss_lines(result.report))
    checks = write_merged(
        result,
        target,
        Origin(
            files,
            key=sha256_of([request.key(files), recipe.output.dtype]),
            seconds=seconds,
            evidence=evidence,
            modules_to_save=recipe.modules_to_save,
            kept=recipe.order if recipe.keep_factors else None,
        ),
        dtype=getattr(torch, recipe.output.dtype) if recipe.output.dtype else None,
        base=base,
    )
    print(
        f"{target}: {counted(len(files), 'adapter')} merged with {recipe.method} in "
        f"{seconds:.2f} s, rank {result.adapter.max_rank}, "
        f"{kept_line(result.report)}, verified"
    )
    return {"outputs": {"adapter": str(target)}, "checks": checks}


def refuse_unused(recipe: MergeRecipe) -> None:
    """Raise RecipeError, with all problems, if resources are asked for that a base alone uses."""
    problems, how = [], recipe.resources
    if how.dtype:
        problems.append(
            f"resources.dtype: {how.dtype} but merges compute in float32 and no base is run "
            "without data. Leave it out; output.dtype is what is written."
        )
    if how.whole_gpus > 1:
        problems.append(
            f"resources.gpus_per_worker: {how.whole_gpus} but a worker merges on one and no base "
            "is run without data. Give it one."
        )
    if how.grams != "full":
        problems.append(
            f"resources.grams: {how.grams} but none are gathered without data. Leave it out."
        )
    if problems and recipe.data is None:
        raise RecipeError(problems)


def merge_here(recipe: MergeRecipe, target: Path) -> dict[str, Any]:
    """Merge in this process, with what needs no base to be run; see `merge_recipe`."""
    find_device(recipe.resources.device)
    with contextlib.ExitStack() as stack:  # what is kept goes when the result is there

        def serial(files: list[AdapterFile], request: MergeRequest) -> tuple[MergeResult, float]:
            started, key = time.monotonic(), request.key(files)
            kept = Kept(scratch_place(target, "merging", key), key)
            result = merge_kept([file.load() for file in files], request, kept)
            stack.callback(shutil.rmtree, kept.folder, ignore_errors=True)
            return result, time.monotonic() - started

        return merge_recipe(recipe, target, serial)
