"""A long merge in this process: kept beside the output as it goes, so that a killed one goes on.

Nothing is written before `EVERY` seconds of work, so a short merge leaves no trace. Modules and
sums do not depend on how often they were kept: the bytes in the end are those of one go.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from icm_ray.adapters import AdapterFile
from icm_ray.checkpoint import load_state, save_state
from icm_ray.merging.inputs import ReadFactors
from icm_ray.merging.merge import assemble, merge_modules, opened
from icm_ray.merging.module import MergedModule
from icm_ray.merging.order import MergeOrder, MergeRequest
from icm_ray.merging.passes import Measured, concluded, measure_modules, passes_of
from icm_ray.types import Adapter, LoRAFactors, MergeResult, ModuleReport

EVERY = 20.0
"""Seconds of work between two states."""
Advance = Callable[[int], None]
"""Moves the bar by so many pieces."""


@dataclass
class Kept:
    """Where a merge keeps what it has done.

    Attributes:
        folder: Scratch folder beside the output; made when there is something to keep.
        key: Identifies the merge.
        every: Seconds of work between two states.
    """

    folder: Path
    key: str
    every: float = EVERY
    _saved: float = field(default_factory=time.monotonic)

    def is_due(self) -> bool:
        """Say whether it is time for a state, and start counting anew."""
        if time.monotonic() - self._saved < self.every:
            return False
        self._saved = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        return True


def merge_kept(
    adapters: Sequence[Adapter | AdapterFile], request: MergeRequest, kept: Kept
) -> MergeResult:
    """Merge in this process, going on where a killed run of the same merge ended; see `merge`."""
    adapters, order, read = opened(adapters, request)
    passes = len(passes_of(order))
    total = (passes + 1) * len(order.present)
    is_seen = sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=not is_seen) as drawn:
        advance = partial(drawn.advance, drawn.add_task(f"merge {order.method}", total=total))
        for number in range(passes):
            order = concluded(order, number, [_measured(order, number, read, kept, advance)])
        return assemble(order, _merged(order, read, kept, advance), adapters)


def _measured(
    order: MergeOrder, number: int, read: ReadFactors, kept: Kept, advance: Advance
) -> Measured:
    """Return what a pass measures of all modules."""
    place, modules = kept.folder / f"pass-{number}.safetensors", list(order.present)
    state = load_state(place, kept.key)
    done, sums = _read_sums(*state) if state else (0, Measured())
    advance(done)
    for index in range(done, len(modules)):
        part = measure_modules(order, number, modules[index : index + 1], read)
        sums.take(part)
        sums.floats |= part.floats
        advance(1)
        if kept.is_due():
            tensors = {f"whole/{name}": value for name, value in sums.whole.items()}
            for module, values in sums.floats.items():
                tensors |= {f"float/{module}/{name}": value for name, value in values.items()}
            save_state(place, tensors, {"key": kept.key, "done": str(index + 1)})
    return sums


def _read_sums(stored: Mapping[str, Tensor], notes: Mapping[str, str]) -> tuple[int, Measured]:
    sums = Measured()
    for name, value in stored.items():
        kind, _, rest = name.partition("/")
        module, _, own = rest.rpartition("/")
        if kind == "whole":
            sums.whole[rest] = value
        else:
            sums.floats[module] = {**sums.floats.get(module, {}), own: value}
    return int(notes["done"]), sums


def _merged(
    order: MergeOrder, read: ReadFactors, kept: Kept, advance: Advance
) -> dict[str, MergedModule]:
    """Return all modules, merged."""
    done: dict[str, MergedModule] = {}
    for place in sorted(kept.folder.glob("modules-*.safetensors")):
        if state := load_state(place, kept.key):
            done |= _read_modules(*state)
    new: dict[str, MergedModule] = {}
    for index, module in enumerate(order.present):
        if module not in done:
            new |= merge_modules(order, [module], read)
        advance(1)
        if new and kept.is_due():
            _save_modules(kept.folder / f"modules-{index:06d}.safetensors", new, kept.key)
            done, new = {**done, **new}, {}
    return {**done, **new}


def _save_modules(place: Path, modules: Mapping[str, MergedModule], key: str) -> None:
    tensors, reports = {}, {}
    for module, one in modules.items():
        reports[module] = {"report": asdict(one.report), "tasks": list(one.tasks)}
        for number, factors in enumerate([one.factors, *one.tasks.values()]):
            tensors[f"{module}/{number}/a"] = factors.a.contiguous()
            tensors[f"{module}/{number}/b"] = factors.b.contiguous()
        if one.values is not None:
            tensors[f"{module}/values"] = one.values
    save_state(place, tensors, {"key": key, "modules": json.dumps(reports)})


def _read_modules(
    stored: Mapping[str, Tensor], notes: Mapping[str, str]
) -> dict[str, MergedModule]:
    def factors(module: str, number: int) -> LoRAFactors:
        return LoRAFactors(stored[f"{module}/{number}/a"], stored[f"{module}/{number}/b"])

    def one(module: str, noted: Mapping[str, Any]) -> MergedModule:
        report = {**noted["report"], "absent": tuple(noted["report"]["absent"])}
        tasks = {task: factors(module, at) for at, task in enumerate(noted["tasks"], 1)}
        values = stored.get(f"{module}/values")
        return MergedModule(factors(module, 0), ModuleReport(**report), tasks, values)

    return {module: one(module, noted) for module, noted in json.loads(notes["modules"]).items()}
