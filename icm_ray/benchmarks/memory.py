"""Memory of merges: of one call in this process, and of all our processes over many adapters."""

import contextlib
import ctypes
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from icm_ray.adapters import fingerprint_of, load_adapter, save_adapter
from icm_ray.config import BenchmarkRecipe
from icm_ray.distributed.memory import ManyRow, merge_many
from icm_ray.merging.merge import merge
from icm_ray.merging.order import MergeRequest
from icm_ray.seeding import generator
from icm_ray.types import Adapter, LoRAFactors


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
        paths = [Path(folder) / name for name in names]
        for row in recipe.many_methods:
            request = MergeRequest(row.method, row.params, None, row.rank, recipe.seed)
            label = f"{row.name} {row.rank}" if row.rank else row.name
            of_method = [
                in_fresh_process(merge_many, paths[:count], request, recipe.resources, label)
                for count in sorted(recipe.many)
            ]
            rows += [
                ManyRow(**{**vars(one), "growth": one.net / of_method[0].net}) for one in of_method
            ]
    return rows
