"""What adapters are and what a merge of them will cost, read from file headers."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from icm_ray.adapters import (
    AdapterFile,
    check_together,
    geometry_of,
    open_all,
    readings,
    tied_warnings,
)
from icm_ray.adapters.base_folder import BaseFolder, open_base
from icm_ray.adapters.fused import is_expert
from icm_ray.config import MergeRecipe, folder_names
from icm_ray.errors import InputError, one_line
from icm_ray.files import refuse_inputs
from icm_ray.linalg.blockwise import OVERSAMPLING, TURNS
from icm_ray.linalg.radix import most_bins
from icm_ray.merging.cut import serving_rank
from icm_ray.merging.folder import dtype_name
from icm_ray.merging.order import MergeOrder, MergeRequest, idle_lines, plan_merge
from icm_ray.merging.passes import passes_of
from icm_ray.merging.requirements import needs_of
from icm_ray.merging.sources import open_inputs, sources_of
from icm_ray.methods import find_method

BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
FLOPS_PER_SECOND = 1e10
"""One laptop core, including the traffic that small matrices cause; a plan is an estimate."""
LARGE_PRODUCT = 0.2
"""What an operation of a large product costs, in the same unit."""
MODULE = 1e7
"""What a module costs however small it is, in the same unit."""
VISIT, VISIT_COMPILED = 40.0, 4.0
"""What visiting one entry of one task costs beside its product, by torch and by compiled loops."""
PROCESS_BYTES = 350_000_000
"""A worker that has imported torch, before it holds any adapter."""
WRITER_BYTES = 400_000_000
"""A process that has imported PEFT too, to check what it writes on a base."""


def inspect_adapters(folders: Sequence[Path]) -> dict[str, Any]:
    """Return each adapter's facts, and of them together warnings, problems and their geometry.

    Raises:
        InputError: every problem of every folder by itself.
    """
    names = folder_names(map(str, folders))
    files = open_all(list(zip(names, folders, strict=True)), "keep")
    warnings, problems = [], []
    try:
        warnings += warnings_of(files)
    except InputError as error:  # what keeps them apart is shown beside what each of them is
        problems += error.problems
    warnings += [
        f"{file.name}: modules_to_save: {len(file.saved)} whole layers, such as "
        f"{file.saved_names[0]}; the recipe's modules_to_save says what becomes of them."
        for file in files
        if file.saved
    ]
    found = geometry_of(files) if len(files) > 1 and not problems else None
    return {
        "adapters": [_facts(file) for file in files],
        "warnings": warnings,
        "problems": problems,
        "cosines": found.cosines if found else {},
        "geometry": asdict(found) if found else None,
        "readings": readings(found) if found else [],
    }


def warnings_of(files: Sequence[AdapterFile], base: BaseFolder | None = None) -> list[str]:
    """Return, once each, what is odd about adapters, together and alone; none stops a merge."""
    users: dict[str, list[AdapterFile]] = {}
    for file in files:
        for line in dict.fromkeys(file.warnings):
            users.setdefault(line.removeprefix(f"{file.path}"), []).append(file)
    lines = check_together(files)
    for text, those in users.items():
        alike = f" ({len(those)} adapters alike)" if len(those) > 1 else ""
        lines.append(f"{those[0].path}{text}{alike}")
    return [*lines, *tied_warnings(files, base)]


def unproven_lines(names: Iterable[str]) -> list[str]:
    """Return what is said of adapters that no task asks for."""
    return [
        f"{name}: no task of that name, so it is merged and unproven." for name in sorted(names)
    ]


def warn(lines: Iterable[str]) -> None:
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
        "fused_experts": sum(map(is_expert, file.layouts.values())),
        "ranks": sorted({rank for _, _, rank in shapes}),
        "scalings": sorted(set(file.scaling.values())),
        "dtype": dtype_name(file.dtype),
        "bytes": file.bytes,
        "norm": file.norm,
        "fingerprint": file.fingerprint,
        "not_merged": list(file.saved),
    }


def plan(recipe: MergeRecipe) -> dict[str, Any]:
    """Return what the recipe will make and need: rank, size, memory, time, cluster.

    Raises:
        RecipeError: the method's parameters or the rank policy are wrong.
        InputError: adapters are missing, broken or do not fit together; all of them are named.
    """
    if "://" not in recipe.output.path:
        refuse_inputs(Path(recipe.storage or "", recipe.output.path), sources_of(recipe))
    files = open_inputs(recipe, hashed=False)
    order = plan_merge(files, MergeRequest.of(recipe), is_gathered_later=True)
    warnings = [*warnings_of(files), *idle_lines(order)]
    ranks, stacked, flops, largest = _sizes(order, files)
    top = max(ranks.values())
    size = sum(ranks[m] * _width(order, files, m) for m in ranks)
    stored = recipe.output.dtype or dtype_name(files[0].dtype)
    worker = PROCESS_BYTES + largest
    # The merge in float32 and as it is written; where a base is named, PEFT and its copies too.
    imported, copies = (WRITER_BYTES, 2) if recipe.base else (PROCESS_BYTES, 1)
    writer = imported + largest + copies * size * (BYTES["float32"] + BYTES[stored])
    writer += sum(file.bytes for file in files) + _base_bytes(recipe)
    workers = recipe.resources.workers or "as many as CPUs allow"
    if warning := find_method(recipe.method).warns(len(files), **order.params):
        warnings.append(warning)
    summary = {
        "adapters": f"{len(files)}: " + ", ".join(f.name for f in files),
        "fit together": f"yes, {len(order.present)} modules",
        "modules not in every adapter": sum(len(t) < len(files) for t in order.present.values()),
        "output rank": f"{top} (exact would be {max(stacked.values())})",
        "server needs": f"--max-lora-rank {serving_rank([top])}",
        "output size": f"{size * BYTES[stored] / 1e6:.2f} MB in {stored}",
        "memory a worker": f"{writer / 1e6:.0f} MB where the result is written and checked, "
        f"{worker / 1e6:.0f} MB where it is only merged",
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
        "worker_bytes": worker,
        "writer_bytes": writer,
        "seconds": flops / FLOPS_PER_SECOND,
        "modules": len(order.present),
    }


def merge_seconds(files: Sequence[AdapterFile], request: MergeRequest) -> float:
    """Return about how long one core takes to merge open files as asked."""
    *_, flops, _ = _sizes(plan_merge(files, request, is_gathered_later=True), files)
    return flops / FLOPS_PER_SECOND


def _base_bytes(recipe: MergeRecipe) -> int:
    """Return what the base takes in float32, in which the result is checked on it; 0 if unknown."""
    folder = Path(recipe.base or "")
    if not recipe.base or not folder.is_dir():
        return 0
    stored = (info for _, info in open_base(folder).tensors.values())
    return BYTES["float32"] * sum(math.prod(info.shape) for info in stored)


def _data_needed(recipe: MergeRecipe) -> str:
    needs = needs_of(recipe.method, recipe.output.metric)
    if needs is None:
        return "none"
    inputs = recipe.data.most if recipe.data else 0
    gathered = f"gathered from {inputs} unlabelled inputs a task on Ray"
    if recipe.evidence:
        rest = f"; what it lacks is {gathered}" if recipe.data else ""
        return f"{needs}, ready in {recipe.evidence}{rest}"
    return f"{needs}, {gathered}"


def _sizes(
    order: MergeOrder, files: Sequence[AdapterFile]
) -> tuple[dict[str, int], dict[str, int], float, int]:
    """Return output ranks, exact ranks, flops and the largest module's bytes."""
    shapes = {file.name: file.shapes for file in files}
    ranks, stacked, flops, largest = {}, {}, 0.0, 0
    row, counts = find_method(order.method), 0
    looks = 1 + sum(one.share for one in passes_of(order))
    if looks > 2:  # of all tasks: a module's, their sum, and the sum's sums
        counts = 4 * BYTES["float64"] * most_bins(len(order.tasks)) * len(order.tasks)
    for module, tasks in order.present.items():
        d_out, d_in, _ = shapes[tasks[0]][module]
        total = sum(shapes[task][module][2] for task in tasks)
        stacked[module] = min(d_out, d_in) if row.is_dense else min(total, d_out, d_in)
        even = int(order.rule.number) // len(order.present)  # of a total, before it is merged
        limit = {"at most": int(order.rule.number), "total": even}.get(order.rule.kind)
        ranks[module] = min(limit or stacked[module], stacked[module])
        if row.is_dense:
            visits = _visit() * len(tasks) + 2.0 * total * LARGE_PRODUCT
            turns = 2.0 * 2.0 * TURNS * (ranks[module] + OVERSAMPLING) * LARGE_PRODUCT
            flops += d_out * d_in * (looks * visits + turns)
            largest = max(largest, 8 * (total * (d_out + d_in) + d_out * d_in) + counts)
        else:
            products = 6.0 * total * total * (d_out + d_in) * LARGE_PRODUCT
            flops += looks * (products + 20.0 * total**3 + MODULE)
            flops += row.fit_flops(total)
            largest = max(largest, 20 * total * (d_out + d_in))
    return ranks, stacked, flops, largest


def _visit() -> float:
    return VISIT_COMPILED if find_spec("numba") else VISIT


def _width(order: MergeOrder, files: Sequence[AdapterFile], module: str) -> int:
    file = next(file for file in files if module in file.shapes)
    d_out, d_in, _ = file.shapes[module]
    return d_out + d_in
