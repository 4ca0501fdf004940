"""One merge recipe, from the first check to the verified folder; the caller says who computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from icm_ray.adapters import AdapterFile, check_base, open_all
from icm_ray.config import MergeRecipe
from icm_ray.errors import RecipeError
from icm_ray.files import refuse_foreign, sha256_of
from icm_ray.methods.given import given
from icm_ray.methods.merge import find_method, plan_merge
from icm_ray.output import write_merged
from icm_ray.planning import warn, warnings_of
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
    _check_sources(recipe, gatherer)
    refs = [(ref.name, Path(ref.path)) for ref in recipe.adapters]
    files = open_all(refs, recipe.modules_to_save)
    evidence = Path(recipe.evidence) if recipe.evidence else None
    order = {"params": recipe.params, "output_rank": recipe.output.rank, "seed": recipe.seed}
    plan_merge(files, recipe.method, evidence=evidence, is_gathered_later=True, **order)
    prints = {file.name: file.fingerprint() for file in files}
    base = None
    if recipe.base:
        cache = Path(recipe.cache) if recipe.cache else None
        base = prepare_base(recipe.base, cache, recipe.revision, progress=print)
        check_base(files, base)
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


def _check_sources(recipe: MergeRecipe, gatherer: Gatherer | None) -> None:
    """Refuse a recipe whose evidence is missing, doubled, useless or cannot be gathered here."""
    needs = find_method(recipe.method).needs
    problems = []
    if recipe.data is not None and needs is None:
        problems.append(f"data: method {recipe.method!r} gathers none. Leave it out.")
    elif recipe.data is not None and recipe.evidence is not None:
        problems.append("data, evidence: both named but one is expected. Leave one out.")
    elif recipe.data is not None and not recipe.base:
        problems.append("base: missing but data are run through it. Name the adapters' base.")
    elif recipe.data is not None and gatherer is None:
        problems.append(
            "data: gathered by running the base on Ray, which this command does not. Run "
            "python -m jobs.merge with the same recipe, or name evidence that is ready."
        )
    elif needs and recipe.data is None and recipe.evidence is None:
        problems.append(
            f"evidence: missing but method {recipe.method!r} needs {needs}. Name base and data, or "
            "a folder written by jobs.evidence."
        )
    if problems:
        raise RecipeError(problems)
