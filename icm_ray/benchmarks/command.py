"""Whole commands as a user starts them, beside what they cannot do without."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from icm_ray.adapters import AdapterFile, open_all, save_adapter
from icm_ray.adapters.peft_format import WEIGHTS_FILE
from icm_ray.benchmarks.arithmetic import cut_of
from icm_ray.benchmarks.memory import random_adapter
from icm_ray.config import BenchmarkRecipe, CommandBenchmark
from icm_ray.merging.folder import Origin, write_merged
from icm_ray.merging.merge import merge_as_asked
from icm_ray.merging.order import MergeRequest, plan_merge

STAGES = ("opening", "merging", "writing")


@dataclass(frozen=True)
class CommandRow:
    """Seconds of one whole merge, of its plan, and of their parts.

    Attributes:
        label: Of the comparison.
        method: The merge method.
        bytes_read: Size of the adapters' weights.
        wall: Of `icm-ray merge`, seconds of the clock; the least of its runs, as all that follow.
        cpu: Of the same, user and system seconds of its process.
        plan: The same of `icm-ray plan`.
        start: The same of `import torch`.
        stages: CPU seconds of a merge in a process that has imported everything: opening (which
            looks at all values), merging, and writing with its verification.
        least: CPU seconds of reading the values as float32, the method with its cut, and writing
            the result to the disk, each by itself.
        goal: What is asked.
    """

    label: str
    method: str
    bytes_read: int
    wall: float
    cpu: float
    plan: float
    start: float
    stages: Mapping[str, float]
    least: Mapping[str, float]
    goal: str


def whole_command(how: CommandBenchmark, recipe: BenchmarkRecipe) -> CommandRow:
    """Write random adapters, and merge them by `icm-ray merge` in processes of one thread."""
    torch.set_num_threads(1)
    layers = {f"layers.{i}.{n}": s for i in range(how.copies) for n, s in how.layers.items()}
    with tempfile.TemporaryDirectory(prefix="icm_ray-benchmark-") as place:
        root, dtype = Path(place), getattr(torch, how.dtype)
        paths = [root / f"task{k}" for k in range(recipe.adapters)]
        for path in paths:
            adapter = random_adapter(layers, path.name, recipe.rank, recipe.seed)
            save_adapter(replace(adapter, dtype=dtype), path)
        written = {"adapters": [str(path) for path in paths], "method": how.method}
        content = {**written, "output": {"path": str(root / "out"), "rank": recipe.rank}}
        (root / "merge.yaml").write_text(yaml.safe_dump(content))

        def command(verb: str) -> tuple[float, float]:
            words = ["-m", "icm_ray", verb, "-c", str(root / "merge.yaml")]
            return min(_spent(words) for _ in range(how.repeats))

        cpu, wall = command("merge")
        stages, least = {}, {}
        if how.alone:
            files = open_all([(path.name, path) for path in paths])
            request = MergeRequest(how.method, None, None, recipe.rank, recipe.seed)
            stages = _least_of(how.repeats, lambda: _stages(paths, request, root / "again"))
            least = _least_of(how.repeats, lambda: _least(files, request, root / "least"))
        return CommandRow(
            label=how.label,
            method=how.method,
            bytes_read=sum(path.joinpath(WEIGHTS_FILE).stat().st_size for path in paths),
            wall=wall,
            cpu=cpu,
            plan=command("plan")[0],
            start=min(_spent(["-c", "import torch"]) for _ in range(how.repeats))[0],
            stages=stages,
            least=least,
            goal=how.goal,
        )


def _spent(words: Sequence[str]) -> tuple[float, float]:
    """Return CPU and wall seconds of a Python process of one thread."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.monotonic() - started


def _least_of(repeats: int, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the smallest number of each part over some runs."""
    runs = [run() for _ in range(repeats)]
    return {part: min(one[part] for one in runs) for part in runs[0]}


@contextmanager
def _timed(parts: dict[str, float], part: str) -> Iterator[None]:
    started = time.process_time()
    yield
    parts[part] = time.process_time() - started


def _stages(paths: Sequence[Path], request: MergeRequest, target: Path) -> dict[str, float]:
    """Do what the command does, stage by stage."""
    parts: dict[str, float] = {}
    with _timed(parts, "opening"):
        files = open_all([(path.name, path) for path in paths])
    with _timed(parts, "merging"):
        result = merge_as_asked([file.load() for file in files], request)
    with _timed(parts, "writing"):
        write_merged(result, target, Origin(files, key=""))
    return parts


def _least(files: Sequence[AdapterFile], request: MergeRequest, target: Path) -> dict[str, float]:
    """Do what nobody can do without."""
    parts: dict[str, float] = {}
    with _timed(parts, "reading"):
        for file in files:
            for tensor in load_file(file.file).values():
                tensor.float()
    adapters = [file.load() for file in files]
    order = plan_merge(adapters, request)
    with _timed(parts, "arithmetic"):
        merged: dict[str, Any] = cut_of(order, adapters)
    dtype = files[0].dtype
    with _timed(parts, "writing"):
        tensors = {
            f"{n}.{i}": x.to(dtype) for n, pair in merged.items() for i, x in enumerate(pair)
        }
        save_file(tensors, target)
        with target.open("rb") as handle:
            os.fsync(handle)
    return parts
