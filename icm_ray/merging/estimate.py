"""What adapters are and what a merge of them will cost, read from file headers."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, check_together, default_name, open_all, tied_warnings
from icm_ray.config import MergeRecipe
from icm_ray.errors import RecipeError, one_line
from icm_ray.linalg import lowrank
from icm_ray.merging.cut import serving_rank
from icm_ray.merging.folder import dtype_name
from icm_ray.merging.order import MergeOrder, plan_merge
from icm_ray.merging.passes import passes_of
from icm_ray.merging.sources import open_adapters
from icm_ray.methods import find_method

BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
FLOPS_PER_SECOND = 1e10
"""One laptop core, including the traffic that small matrices cause; a plan is an estimate."""
VISIT = 40.0
"""What visiting one entry of one task costs beside its product, in the same unit."""
PROCESS_BYTES = 350_000_000
"""A worker that has imported torch, before it holds any adapter."""


def inspect_adapters(folders: Sequence[Path]) -> dict[str, Any]:
    """Return each adapter's facts, warnings about them together, and cosines of their deltas.

    Raises:
        InputError: every problem of every folder.
    """
    files = open_all([(default_name(folder), folder) for folder in folders], "drop")
    warnings = warnings_of(files)
    return {
        "adapters": [_facts(file) for file in files],
        "warnings": warnings,
        "cosines": _cosines(files) if len(files) > 1 else {},
    }


def warnings_of(files: Sequence[AdapterFile], base: Path | None = None) -> list[str]:
    """Return, once each, what is odd about adapters, together and alone; none stops a merge."""
    alone = [warning for file in files for warning in file.warnings]
    return list(dict.fromkeys([*check_together(files), *alone, *tied_warnings(files, base)]))


def warn(lines: Sequence[str]) -> None:
    """Tell warnings on stderr, one safe line each."""
    for line in lines:
        print(f"warning: {one_line(line)}", file=sys.stderr)


def _facts(file: AdapterFile) -> dict[str, Any]:
    shapes = file.shapes.values()
    return {
        "name": file.name,
        "path": str(file.path),
        "format": file.format,
        "base_model": file.base_model,
        "modules": len(file.shapes),
        "ranks": sorted({rank for _, _, rank in shapes}),
        "scalings": sorted(set(file.scaling.values())),
        "dtype": dtype_name(file.dtype),
        "bytes": file.bytes,
        "norm": file.norm,
        "fingerprint": file.fingerprint(),
        "not_merged": list(file.saved),
    }


def _cosines(files: Sequence[AdapterFile]) -> dict[str, dict[str, float]]:
    """Return cosines of whole deltas; reads two modules at a time, never two adapters."""
    gram = {a.name: {b.name: 0.0 for b in files} for a in files}
    for module in sorted({m for f in files for m in f.shapes}):
        held = {f.name: f.factors(module) for f in files if module in f.shapes}
        for a, f in held.items():
            for b, g in held.items():
                gram[a][b] += lowrank.inner(f.b, f.a, g.b, g.a)
    return {
        a: {b: gram[a][b] / max((gram[a][a] * gram[b][b]) ** 0.5, 1e-30) for b in gram}
        for a in gram
    }


def plan_recipe(recipe: MergeRecipe) -> dict[str, Any]:
    """Return what the recipe will make and need: rank, size, memory, time, cluster.

    Raises:
        RecipeError: the method, its parameters or the rank policy are wrong.
        InputError: adapters are missing, broken or do not fit together; all of them are named.
    """
    find_method(recipe.method)
    check_sources(recipe, can_gather=True)
    files = open_adapters(recipe)
    order = plan_merge(
        files,
        recipe.method,
        recipe.params,
        recipe.evidence,
        recipe.output.rank,
        recipe.seed,
        is_gathered_later=True,
    )
    warnings = warnings_of(files)
    ranks, stacked, flops, largest = _sizes(order, files)
    top = max(ranks.values())
    size = sum(ranks[m] * _width(order, files, m) for m in ranks)
    stored = recipe.output.dtype or dtype_name(files[0].dtype)
    workers = recipe.resources.workers or "as many as CPUs allow"
    if recipe.method == "task_arithmetic" and len(files) > 2 and order.params["scale"] == 1:
        warnings.append(
            f"scale 1 adds {len(files)} deltas up; 0.3 to 0.5 is usual, 1/K is their average."
        )
    summary = {
        "adapters": f"{len(files)}: " + ", ".join(f.name for f in files),
        "fit together": f"yes, {len(order.present)} modules",
        "modules not in every adapter": sum(len(t) < len(files) for t in order.present.values()),
        "output rank": f"{top} (exact would be {max(stacked.values())})",
        "server needs": f"--max-lora-rank {serving_rank([top])}",
        "output size": f"{size * BYTES[stored] / 1e6:.2f} MB in {stored}",
        "memory a worker": f"{(PROCESS_BYTES + largest) / 1e6:.0f} MB",
        "time": f"about {flops / FLOPS_PER_SECOND:.1f} s of one core, plus 10 s to start Ray",
        "cluster": f"workers: {workers}; CPUs {recipe.resources.cpus_per_worker:g} and GPUs "
        f"{recipe.resources.gpus_per_worker:g} each",
        "data needed": _data_needed(recipe),
    }
    return {
        "summary": summary,
        "warnings": warnings,
        "output_rank": top,
        "exact_rank": max(stacked.values()),
        "output_bytes": size * BYTES[stored],
        "worker_bytes": PROCESS_BYTES + largest,
        "seconds": flops / FLOPS_PER_SECOND,
        "modules": len(order.present),
    }


def check_sources(recipe: MergeRecipe, *, can_gather: bool) -> None:
    """Refuse a recipe whose evidence is missing, doubled, useless or cannot be gathered here.

    Raises:
        RecipeError: every such problem.
    """
    needs = find_method(recipe.method).needs
    problems = []
    if recipe.learn and needs != "LearnedMerge":
        problems.append(f"learn: method {recipe.method!r} learns nothing. Leave it out.")
    if recipe.data is not None and needs is None:
        problems.append(f"data: method {recipe.method!r} gathers none. Leave it out.")
    elif recipe.data is not None and needs == "FusionModel":
        problems.append("data: a Fusion-VAE is trained by jobs.train_fusion. Name it as evidence.")
    elif recipe.data is not None and recipe.evidence is not None:
        problems.append("data, evidence: both named but one is expected. Leave one out.")
    elif recipe.data is not None and not recipe.base:
        problems.append("base: missing but data are run through it. Name the adapters' base.")
    elif recipe.data is not None and not can_gather:
        problems.append(
            "data: gathered by running the base on Ray, which this command does not. Run "
            "python -m jobs.merge with the same recipe, or name evidence that is ready."
        )
    elif needs and recipe.data is None and recipe.evidence is None:
        advice = "Name base and data, or a folder written by jobs.evidence."
        if needs == "FusionModel":
            advice = "Name a folder written by jobs.train_fusion."
        problems.append(f"evidence: missing but method {recipe.method!r} needs {needs}. {advice}")
    if problems:
        raise RecipeError(problems)


def _data_needed(recipe: MergeRecipe) -> str:
    needs = find_method(recipe.method).needs
    if needs is None:
        return "none"
    if recipe.evidence:
        return f"{needs}, ready in {recipe.evidence}"
    inputs = recipe.data.inputs_per_task if recipe.data else 0
    return f"{needs}, gathered from {inputs} unlabelled inputs a task on Ray"


def _sizes(
    order: MergeOrder, files: Sequence[AdapterFile]
) -> tuple[dict[str, int], dict[str, int], float, int]:
    """Return output ranks, exact ranks, flops and the largest module's bytes."""
    shapes = {file.name: file.shapes for file in files}
    ranks, stacked, flops, largest = {}, {}, 0.0, 0
    row = find_method(order.method)
    for module, tasks in order.present.items():
        d_out, d_in, _ = shapes[tasks[0]][module]
        total = sum(shapes[task][module][2] for task in tasks)
        stacked[module] = min(d_out, d_in) if row.is_dense else min(total, d_out, d_in)
        limit = int(order.rule.number) if order.rule.kind == "at most" else stacked[module]
        ranks[module] = min(limit, stacked[module])
        if row.is_dense:
            looks = len(passes_of(order)) + 1
            flops += looks * d_out * d_in * (2.0 * total + VISIT * len(tasks))
            flops += 100.0 * d_out * d_in * ranks[module]  # the randomised cut
            largest = max(largest, 8 * (total * (d_out + d_in) + d_out * d_in))
        else:
            flops += 6.0 * total * total * (d_out + d_in) + 20.0 * total**3
            largest = max(largest, 20 * total * (d_out + d_in))
    return ranks, stacked, flops, largest


def _width(order: MergeOrder, files: Sequence[AdapterFile], module: str) -> int:
    file = next(file for file in files if module in file.shapes)
    d_out, d_in, _ = file.shapes[module]
    return d_out + d_in
