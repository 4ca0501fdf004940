"""Merge module shards on Ray: the serial merge, split over workers, equal byte for byte."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from icm_ray.adapters import AdapterFile, random_like, save_adapter
from icm_ray.config import Resources
from icm_ray.distributed.cluster import run_bounded, worker_count, worker_options
from icm_ray.distributed.faults import MAX_RETRIES, LostWork
from icm_ray.distributed.poison import Work, poisoned
from icm_ray.distributed.progress import Bar, bar
from icm_ray.merging.folder import Origin, write_merged
from icm_ray.merging.merge import assemble, merge_as_asked, merge_modules
from icm_ray.merging.module import MergedModule
from icm_ray.merging.order import MergeOrder, MergeRequest, plan_merge
from icm_ray.merging.passes import Measured, concluded, measure_modules, passes_of
from icm_ray.types import LoRAFactors, MergeResult, ModuleReport

SHARD_BYTES = 64_000_000
"""Factors one task reads at least: small modules are merged together, as a task costs 2 ms."""

Pair = tuple[np.ndarray, np.ndarray]
Whole = tuple[Pair, ModuleReport, dict[str, Pair], np.ndarray | None]
Shipped = dict[str, Whole]
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
    modules = shard_modules(order, files, shard_bytes)
    passes = len(passes_of(order))
    with bar((passes + 1) * len(modules), f"merge {order.method}") as drawn:
        shards = _Shards(modules, ray.put({file.name: file for file in files}), resources, drawn)
        for number in range(passes):
            total = Measured()
            work = partial(measure_modules, order, number)
            parts = shards.run(_measure_shard, (ray.put(order), number), work, total.take)
            order = concluded(order, number, [total, *parts])
        parts = shards.run(_merge_shard, (ray.put(order),), partial(merge_modules, order))
    merged = {m: _unship(item) for part in parts for m, item in part.items()}
    return assemble(order, merged, files)


@dataclass(frozen=True)
class _Shards:
    """Runs of modules that one task each works on.

    Attributes:
        modules: Of each.
        files: Reference to the adapters by name.
        resources: What each task gets.
        drawn: The progress bar.
    """

    modules: Sequence[Sequence[str]]
    files: Any
    resources: Resources
    drawn: Bar

    def run(
        self,
        task: Any,
        shared: tuple[Any, ...],
        work: Work,
        done: Callable[[Any], None] = lambda _part: None,
    ) -> list[Any]:
        """Return what a task makes of every shard, in order.

        Args:
            task: Remote; gets `shared`, a shard's modules and the adapters.
            shared: What every task gets.
            work: What the task does, to find out what kills it if something does.
            done: Given each part at once, in order of completion.

        Raises:
            ClusterError: workers died each time; it names the module and the adapter.
        """
        remote = task.options(**worker_options(self.resources)).remote
        slots = [None] * worker_count(self.resources, len(self.modules))
        named = {_name_of(modules): modules for modules in self.modules}

        def finished(_name: str, part: Any) -> None:
            done(part)
            self.drawn.add()

        def call(modules: Sequence[str]) -> Callable[[Any], Any]:
            return lambda _slot: remote(*shared, modules, self.files)

        calls = {name: call(modules) for name, modules in named.items()}
        timeout = self.resources.timeout_seconds
        try:
            return list(run_bounded(slots, calls, timeout=timeout, done=finished).values())
        except LostWork as error:
            lost = [named[str(name)] for name in error.lost]
            raise poisoned(work, lost, self.files, self.resources) or error from None


def _name_of(modules: Sequence[str]) -> str:
    first, last = modules[0], modules[-1]
    return f"module {first!r}" if first == last else f"modules {first!r} to {last!r}"


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
    return {m: _ship(one) for m, one in merged.items()}


def _reader(files: dict[str, AdapterFile]) -> Callable[[str, str], LoRAFactors]:
    return lambda task, module: files[task].factors(module)


def _arrays(factors: LoRAFactors) -> Pair:
    return factors.a.numpy(), factors.b.numpy()


def _ship(one: MergedModule) -> Whole:
    values = None if one.values is None else one.values.numpy()
    tasks = {task: _arrays(own) for task, own in one.tasks.items()}
    return _arrays(one.factors), one.report, tasks, values


def _unship(item: Whole) -> MergedModule:
    pair, report, tasks, values = item
    seen = None if values is None else torch.from_numpy(values.copy())
    own = {task: _factors(factors) for task, factors in tasks.items()}
    return MergedModule(_factors(pair), report, own, seen)


def _factors(pair: Pair) -> LoRAFactors:
    # A copy frees the shard from the object store and makes the tensors writable.
    a, b = (torch.from_numpy(array.copy()) for array in pair)
    return LoRAFactors(a, b)


@ray.remote(max_retries=MAX_RETRIES)
def random_to_folder(file: AdapterFile, seed: int, folder: Path, key: str) -> None:
    """Write a random adapter like another one."""
    save_adapter(random_like(file.load(), seed), folder, info={"key": key})


@ray.remote(max_retries=MAX_RETRIES)
def merge_to_folder(
    files: list[AdapterFile],
    request: MergeRequest,
    folder: Path,
    key: str,
    evicted: Mapping[str, str],
) -> None:
    """Merge in one task and write the verified folder; see `Origin` for what was `evicted`."""
    started = time.monotonic()
    result = merge_as_asked(files, request)
    seconds = time.monotonic() - started
    evidence: Any = request.evidence  # a folder, as a row of a table has it
    origin = Origin.keeping(files, key, seconds, evidence)
    write_merged(result, folder, replace(origin, evicted=evicted))
