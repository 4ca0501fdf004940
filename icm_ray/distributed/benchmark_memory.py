"""Memory of merges: of one call in this process, and of all our processes over many adapters."""

import contextlib
import ctypes
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import ray
import torch

from icm_ray.adapters import fingerprint_of, load_adapter, open_all, save_adapter
from icm_ray.config import BenchmarkRecipe, MethodRow
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.merge import merge_on_ray
from icm_ray.methods.merge import merge
from icm_ray.seeding import generator
from icm_ray.types import Adapter, LoRAFactors

INTERVAL = 0.15
"""Seconds between two samples: weighing walks page tables, and a module takes longer than this."""


@dataclass(frozen=True)
class ManyRow:
    """Memory of one merge of many adapters, summed over our processes.

    PSS counts a page that n processes share as 1/n of a page in each.

    Attributes:
        method: Label of the merge.
        adapters: How many were merged.
        input_bytes: Size of their weight files.
        seconds: Wall time of checking, merging and collecting.
        peak: Largest sum of PSS over the driver and all workers, bytes.
        net: `peak` less `bare`.
        bare: PSS of the same workers before they ran any code of ours.
        driver: PSS of the driver at the peak.
        workers: Most workers seen at once.
        growth: `net` over that of the same method with the fewest adapters.
    """

    method: str
    adapters: int
    input_bytes: int
    seconds: float
    peak: int
    net: int
    bare: int
    driver: int
    workers: int
    growth: float = 1.0


class PeakMemory:
    """Measures how far the body lifts this process's resident memory above its start (Linux)."""

    def __init__(self, *, wanted: bool = True) -> None:
        self.wanted = wanted
        self.extra_bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.wanted:
            with contextlib.suppress(OSError, AttributeError):
                # What earlier calls freed goes back to the system, or it would hide this one's.
                ctypes.CDLL(None).malloc_trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
                self.start = _status("VmRSS")
            except OSError:
                self.wanted = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.wanted:
            self.extra_bytes = max(_status("VmHWM") - self.start, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def random_adapter(layers: Mapping[str, Sequence[int]], name: str, rank: int, seed: int) -> Adapter:
    """Return one adapter whose values depend on seed, name and layer alone.

    Normal entries make tasks nearly orthogonal: the hard case for a cut to a small rank.
    """
    modules = {}
    for layer, (d_out, d_in) in layers.items():
        source = generator(seed, name, layer)
        a = torch.randn(rank, d_in, generator=source) / d_in**0.5
        modules[layer] = LoRAFactors(a, 0.02 * torch.randn(d_out, rank, generator=source))
    return Adapter(name, None, modules, {}, fingerprint_of(modules))


def whole_model(recipe: BenchmarkRecipe) -> dict[str, Any]:
    """Read whole adapters from disk and merge them by svd: seconds, bytes and memory."""
    torch.set_num_threads(1)
    layers = {f"{i}.{n}": s for i in range(recipe.whole_model) for n, s in recipe.layers.items()}
    with tempfile.TemporaryDirectory(prefix="icm_ray-benchmark-") as folder:
        paths = [Path(folder) / f"task{k}" for k in range(recipe.adapters)]
        for path in paths:
            save_adapter(random_adapter(layers, path.name, recipe.rank, recipe.seed), path)
        save_adapter(random_adapter({"warm": [8, 8]}, "warm", 2, 0), Path(folder) / "warm")
        load_adapter(Path(folder) / "warm")  # imports what reading needs
        size = sum(file.stat().st_size for path in paths for file in path.glob("*.safetensors"))
        with PeakMemory() as peak:
            wall, cpu = time.monotonic(), time.process_time()
            adapters = [load_adapter(path) for path in paths]
            read = time.process_time() - cpu
            merge(adapters, "svd", output_rank=recipe.rank)
            seconds = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    return {
        "modules": len(layers),
        "bytes_read": size,
        "wall_seconds": seconds["wall"],
        "cpu_seconds": seconds["cpu"],
        "cpu_seconds_reading": read,
        "peak_bytes": peak.extra_bytes,
    }


def many_adapters(
    recipe: BenchmarkRecipe, in_fresh_process: Callable[..., ManyRow]
) -> list[ManyRow]:
    """Merge the first n of the same adapters for each n and method, each in a fresh process."""
    layers = {f"layers.{i:03d}.proj": recipe.many_shape for i in range(recipe.many_modules)}
    rows: list[ManyRow] = []
    with tempfile.TemporaryDirectory(prefix="icm_ray-benchmark-") as folder:
        names = [f"task{k:04d}" for k in range(max(recipe.many))]
        for name in names:
            adapter = random_adapter(layers, name, recipe.rank, recipe.seed)
            save_adapter(adapter, Path(folder) / name)
        for method in recipe.many_methods:
            found = [
                in_fresh_process(merge_many, recipe, method, folder, names[:count])
                for count in sorted(recipe.many)
            ]
            rows += [ManyRow(**{**vars(row), "growth": row.net / found[0].net}) for row in found]
    return rows


def merge_many(
    recipe: BenchmarkRecipe, method: MethodRow, folder: str, names: Sequence[str]
) -> ManyRow:
    """Merge some of the adapters in `folder` on a local cluster while memory is sampled."""
    with connected(recipe.resources):
        bare = _bare_workers(recipe.resources.workers or 1)
        with Sampler() as sampler:
            started = time.monotonic()
            files = open_all([(name, Path(folder) / name) for name in names])
            merge_on_ray(
                files,
                method.method,
                resources=recipe.resources,
                params=method.params,
                output_rank=method.rank,
                seed=recipe.seed,
            )
            seconds = time.monotonic() - started
        workers = max(sampler.workers, 1)
        print(f"{method.name}: {len(names)} adapters, peak {sampler.peak / 1e6:.0f} MB", flush=True)
        return ManyRow(
            method=f"{method.name} {method.rank}" if method.rank else method.name,
            adapters=len(names),
            input_bytes=sum(file.file.stat().st_size for file in files),
            seconds=seconds,
            peak=sampler.peak,
            net=sampler.peak - workers * bare,
            bare=workers * bare,
            driver=sampler.driver,
            workers=workers,
        )


def _bare_workers(count: int) -> int:
    """Start `count` workers that import nothing of ours and return the PSS of one."""

    def wait() -> None:  # nested, so it travels by value and the worker does not import this file
        time.sleep(0.5)

    ray.get([ray.remote(wait).remote() for _ in range(count)])
    sizes = [_pss(process) for process in _workers(psutil.Process())]
    return sum(sizes) // max(len(sizes), 1)


class Sampler:
    """Samples, in a thread, the PSS of this process and of the Ray workers below it.

    Raylet, GCS and Ray's agents are Ray's own and stay out.

    Attributes:
        peak: Largest sum seen, bytes.
        driver: This process's share of it.
        workers: Most workers seen at once.
    """

    def __init__(self) -> None:
        self.peak = self.driver = self.workers = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        workers: list[psutil.Process] = []
        for turn in range(10**9):
            if turn % 5 == 0:  # looking for new processes costs more than weighing known ones
                workers = _workers(me)
            own = _pss(me)
            sizes = [_pss(process) for process in workers]
            total = own + sum(sizes)
            self.workers = max(self.workers, sum(size > 0 for size in sizes))
            if total > self.peak:
                self.peak, self.driver = total, own
            if self._stop.wait(INTERVAL):
                return


def _workers(driver: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            title = process.cmdline()[0]
            if title.startswith("ray::") and "Agent" not in title:
                found.append(process)
    return found


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it ended between two looks
        return 0
