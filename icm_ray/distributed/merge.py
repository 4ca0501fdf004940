"""Merge module shards on Ray: the serial merge, split over workers, equal byte for byte."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from icm_ray.adapters import AdapterFile
from icm_ray.config import Resources
from icm_ray.distributed.cluster import MAX_RETRIES, run_bounded, worker_count, worker_options
from icm_ray.distributed.progress import bar
from icm_ray.merging.folder import Origin, write_merged
from icm_ray.merging.merge import MergedModule, assemble, merge_as_asked, merge_modules
from icm_ray.merging.order import MergeOrder, MergeRequest, plan_merge
from icm_ray.merging.passes import Measured, concluded, measure_modules, passes_of
from icm_ray.types import LoRAFactors, MergeResult, ModuleReport

SHARD_BYTES = 64_000_000
"""Factors one task reads at least: small modules are merged together, as a task costs 2 ms."""

Pair = tuple[np.ndarray, np.ndarray]
Shipped = dict[str, tuple[Pair, ModuleReport, dict[str, Pair]]]
"""Merged modules as numpy arrays, which the object store hands over without a copy."""


def merge_on_ray(
    files: Sequence[AdapterFile],
    request: MergeRequest,
    resources: Resources,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> MergeResult:
    """Merge open adapter files over the cluster.

    Workers read only their own modules, straight from the files, so the driver never holds the
    inputs and memory does not grow with their number. A method that must know the whole adapter
    first has every shard measured before any is merged.

    Args:
        files: The adapters.
        request: What is asked for.
        resources: What each worker gets.
        shard_bytes: Factors that one task reads at least.
    """
    order = plan_merge(files, request)
    shards = shard_modules(order, files, shard_bytes)
    by_name = ray.put({file.name: file for file in files})
    options = worker_options(resources)
    slots = [None] * worker_count(resources, len(shards))
    passes = len(passes_of(order))

    with bar((passes + 1) * len(shards), f"merge {order.method}") as drawn:

        def everywhere(
            start: Callable[[Sequence[str]], Any], done: Callable[[Any], None] = lambda _part: None
        ) -> list[Any]:
            def finished(_key: int, part: Any) -> None:
                done(part)
                drawn.add()

            calls = {
                i: lambda _slot, modules=modules: start(modules) for i, modules in enumerate(shards)
            }
            timeout = resources.timeout_seconds
            return list(run_bounded(slots, calls, timeout=timeout, done=finished).values())

        for number in range(passes):
            shared = ray.put(order)
            measure, total = _measure_shard.options(**options), Measured()
            parts = everywhere(
                lambda m, s=shared, n=number, f=measure: f.remote(s, n, m, by_name), total.take
            )
            order = concluded(order, number, [total, *parts])
        shared, merge = ray.put(order), _merge_shard.options(**options)
        parts = everywhere(lambda modules: merge.remote(shared, modules, by_name))
    merged = {m: _unship(item) for part in parts for m, item in part.items()}
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
def _measure_shard(
    order: MergeOrder, number: int, modules: Sequence[str], files: dict[str, AdapterFile]
) -> Measured:
    return measure_modules(order, number, modules, _reader(files))


@ray.remote(max_retries=MAX_RETRIES)
def _merge_shard(
    order: MergeOrder, modules: Sequence[str], files: dict[str, AdapterFile]
) -> Shipped:
    merged = merge_modules(order, modules, _reader(files))
    return {
        m: (_arrays(one.factors), one.report, {t: _arrays(f) for t, f in one.tasks.items()})
        for m, one in merged.items()
    }


def _reader(files: dict[str, AdapterFile]) -> Callable[[str, str], LoRAFactors]:
    return lambda task, module: files[task].factors(module)


def _arrays(factors: LoRAFactors) -> Pair:
    return factors.a.numpy(), factors.b.numpy()


def _unship(item: tuple[Pair, ModuleReport, dict[str, Pair]]) -> MergedModule:
    pair, report, tasks = item
    return MergedModule(_factors(pair), report, {t: _factors(own) for t, own in tasks.items()})


def _factors(pair: Pair) -> LoRAFactors:
    # A copy frees the shard from the object store and makes the tensors writable.
    a, b = (torch.from_numpy(array.copy()) for array in pair)
    return LoRAFactors(a, b)


@ray.remote(max_retries=MAX_RETRIES)
def merge_to_folder(
    files: list[AdapterFile], request: MergeRequest, folder: Path, key: str
) -> None:
    """Merge in one task and write the verified folder."""
    started = time.monotonic()
    result = merge_as_asked(files, request)
    seconds = time.monotonic() - started
    evidence: Any = request.evidence  # a folder, as a row of a table has it
    write_merged(result, folder, Origin.keeping(files, key, seconds, evidence))
