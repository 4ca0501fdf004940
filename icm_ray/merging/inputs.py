"""What a method is called with for one module: factors read when asked for, context, evidence."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch

from icm_ray.devices import CPU, find_device
from icm_ray.errors import InputError
from icm_ray.linalg import lowrank
from icm_ray.linalg.gram import Gram
from icm_ray.merging.order import SEEN, MergeOrder
from icm_ray.methods import METHODS
from icm_ray.methods.shared.calibration import calibrated
from icm_ray.methods.shared.grams import grams_of
from icm_ray.types import LoRAFactors, ModuleContext

ReadFactors = Callable[[str, str], LoRAFactors]
"""Gives the factors of `(task, module)`; from memory, or from a file when they are needed."""

UNSEEN = 1e-2
"""Added to the Grams behind a cut, over their mean diagonal entry: a few hundred inputs do not show
every direction."""

Before = Callable[[Sequence[LoRAFactors]], Sequence[LoRAFactors]]
"""A step that changes all tasks' factors of a module at once."""


class Inputs(Sequence[LoRAFactors]):
    """The present tasks' factors, read one at a time: hundreds of adapters are never held at once.

    Attributes:
        norms: Frobenius norm of each delta that was read, by task, if they are wanted.
        changed: All of them after `before`, a step that must see all tasks at once.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        module: str,
        read: ReadFactors,
        *,
        with_norms: bool,
        device: torch.device = CPU,
        before: Before | None = None,
    ) -> None:
        self.tasks, self.module, self.read, self.with_norms = tasks, module, read, with_norms
        self.device, self.before = device, before
        self.changed: Sequence[LoRAFactors] | None = None
        self.norms: dict[str, float] = {}

    def refuse_not_finite(self) -> None:
        """Raise InputError if a delta that was read holds NaN or infinity; files never do."""
        for task, norm in self.norms.items():
            if not math.isfinite(norm):
                raise InputError(
                    f"{task}: {self.module}: values that are not finite, or overflow, but finite "
                    "ones are expected. Check the adapter."
                )

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> LoRAFactors: ...
    @overload
    def __getitem__(self, index: slice) -> list[LoRAFactors]: ...
    def __getitem__(self, index: int | slice) -> LoRAFactors | list[LoRAFactors]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.before is None:
            return self._one(index)
        if self.changed is None:
            self.changed = self.before([self._one(i) for i in range(len(self))])
        return self.changed[index]

    def _one(self, index: int) -> LoRAFactors:
        task = self.tasks[index]
        factors = _plain(self.read(task, self.module), self.device)
        if self.with_norms and task not in self.norms:
            self.norms[task] = lowrank.norm(factors.b, factors.a)
        return factors

    def __iter__(self) -> Iterator[LoRAFactors]:
        return (self[index] for index in range(len(self)))


def _plain(factors: LoRAFactors, device: torch.device) -> LoRAFactors:
    """Return float32 factors on a device; adapters from files are that already on the CPU."""
    if all(x.dtype == torch.float32 and x.device == device for x in (factors.a, factors.b)):
        return factors
    a, b = (x.detach().to(device, torch.float32) for x in (factors.a, factors.b))
    return LoRAFactors(a, b, factors.scaling)


def inputs_of(
    order: MergeOrder, module: str, read: ReadFactors, *, with_norms: bool
) -> tuple[Inputs, ModuleContext, dict[str, Any]]:
    """Return a module's factors, its context, and `evidence=` if the method takes any."""
    tasks, device = order.present[module], find_device(order.device)
    statistics = {name: tensor.to(device) for name, tensor in order.statistics.items()}
    context = ModuleContext(module, tasks, order.tasks, order.seed, statistics)
    row = METHODS[order.method]
    extra: dict[str, Any] = {}
    if "evidence" in inspect.signature(row.function).parameters:
        found = order.evidence and order.evidence.of(module, row.takes, order.tasks)
        known = {name: tensor.to(device) for name, tensor in found.items()} if found else None
        extra["evidence"] = known
    before = _before(order, module)
    inputs = Inputs(tasks, module, read, with_norms=with_norms, device=device, before=before)
    return inputs, context, extra


def seen_by_inputs(order: MergeOrder, module: str, d_in: int) -> Gram | None:
    """Return the Gram of all inputs that a module's merge is about; None if nothing is known."""
    if order.evidence is None:
        return None
    tasks = [task for task in order.tasks if task not in order.silent_at(module)]
    context, device = ModuleContext(module, (), tuple(tasks)), find_device(order.device)
    found = order.evidence.of(module, SEEN, tasks)
    known = {name: tensor.to(device) for name, tensor in found.items()}
    total = None
    for gram in grams_of(d_in, context, known).values():
        own = gram.damped(1.0, UNSEEN)
        total = own if total is None else total + own
    return total if total is not None and total.energies().any() else None


def _before(order: MergeOrder, module: str) -> Before | None:
    """Return what changes a module's factors before the method sees them, if anything does."""
    silent = order.silent_at(module)
    heard = [i for i, task in enumerate(order.present[module]) if task not in silent]
    side = order.steps.calibrate
    if side is None or not heard:
        return None

    def step(factors: Sequence[LoRAFactors]) -> list[LoRAFactors]:
        changed = calibrated([factors[index] for index in heard], side)
        return list({**dict(enumerate(factors)), **dict(zip(heard, changed, strict=True))}.values())

    return step


@contextlib.contextmanager
def finite_only(method: str, module: str) -> Iterator[None]:
    """Tell what a decomposition says of infinities and NaN as what it is: a bad input."""
    try:
        yield
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        raise not_finite(method, module) from None


def not_finite(method: str, module: str) -> InputError:
    """Return the error of a merge that came out infinite or NaN."""
    return InputError(
        f"module {module}: method {method!r} gave a number that is not finite. Check the adapters' "
        "largest values and the method's parameters."
    )
