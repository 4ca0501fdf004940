"""Merge module shards on Ray: the serial merge, split over workers, equal byte for byte."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch

from icm_ray.adapters import AdapterFile
from icm_ray.config import Resources
from icm_ray.distributed.cluster import MAX_RETRIES, request, run_bounded, worker_count
from icm_ray.methods.merge import MergedModule, MergeOrder, assemble, merge_modules, plan_merge
from icm_ray.types import LoRAFactors, MergeResult, ModuleReport, RankPolicy

SHARD_BYTES = 64_000_000
"""Factors one task reads at least: small modules are merged together, as a task costs 2 ms."""

Shipped = dict[str, tuple[np.ndarray, np.ndarray, ModuleReport]]
"""Merged modules as numpy arrays, which the object store hands over without a copy."""


def merge_on_ray(
    files: Sequence[AdapterFile],
    method: str,
    *,
    resources: Resources,
    params: Mapping[str, Any] | None = None,
    evidence: object | None = None,
    output_rank: RankPolicy = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> MergeResult:
    """Merge open adapter files over the cluster; see `icm_ray.merge` for the arguments.

    Workers read only their own modules, straight from the files, so the driver never holds the
    inputs and memory does not grow with their number.
    """
    order = plan_merge(files, method, params, evidence, output_rank, seed)
    shards = shard_modules(order, files, shard_bytes)
    by_name = ray.put({file.name: file for file in files})
    shared_order = ray.put(order)
    options = request(resources)

    def call(modules: Sequence[str]) -> Any:
        return lambda _slot: _merge_shard.options(**options).remote(shared_order, modules, by_name)

    slots = [None] * worker_count(resources, len(shards))
    parts = run_bounded(
        slots,
        {index: call(modules) for index, modules in enumerate(shards)},
        timeout=resources.timeout_seconds,
    )
    merged = {m: _unship(item) for part in parts.values() for m, item in part.items()}
    return assemble(order, merged, files)


def shard_modules(
    order: MergeOrder, files: Sequence[AdapterFile], shard_bytes: int
) -> list[list[str]]:
    """Split the modules, in order, into runs of about `shard_bytes` of input factors."""
    shapes = {file.name: file.shapes for file in files}
    shards: list[list[str]] = [[]]
    filled = 0
    for module, tasks in order.present.items():
        sizes = (shapes[task][module] for task in tasks)
        cost = sum(4 * rank * (d_out + d_in) for d_out, d_in, rank in sizes)
        if shards[-1] and filled + cost > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(module)
        filled += cost
    return shards


@ray.remote(max_retries=MAX_RETRIES)
def _merge_shard(
    order: MergeOrder, modules: Sequence[str], files: dict[str, AdapterFile]
) -> Shipped:
    merged = merge_modules(order, modules, lambda task, module: files[task].factors(module))
    return {m: (f.a.numpy(), f.b.numpy(), report) for m, (f, report) in merged.items()}


def _unship(item: tuple[np.ndarray, np.ndarray, ModuleReport]) -> MergedModule:
    a, b, report = item
    # A copy frees the shard from the object store and makes the tensors writable.
    return LoRAFactors(torch.from_numpy(a.copy()), torch.from_numpy(b.copy())), report
