"""What a method is called with for one module: factors read when asked for, context, evidence."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from icm_ray.linalg import lowrank
from icm_ray.methods import METHODS
from icm_ray.types import LoRAFactors, ModuleContext

if TYPE_CHECKING:
    from icm_ray.methods.merge import MergeOrder

ReadFactors = Callable[[str, str], LoRAFactors]
"""Gives the factors of `(task, module)`; from memory, or from a file when they are needed."""


class Inputs(Sequence[LoRAFactors]):
    """The present tasks' factors, read one at a time: hundreds of adapters are never held at once.

    Attributes:
        norms: Frobenius norm of each delta that was read, by task, if they are wanted.
    """

    def __init__(
        self, tasks: Sequence[str], module: str, read: ReadFactors, *, with_norms: bool
    ) -> None:
        self.tasks, self.module, self.read, self.with_norms = tasks, module, read, with_norms
        self.norms: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> LoRAFactors: ...
    @overload
    def __getitem__(self, index: slice) -> list[LoRAFactors]: ...
    def __getitem__(self, index: int | slice) -> LoRAFactors | list[LoRAFactors]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        task = self.tasks[index]
        factors = self.read(task, self.module)
        if self.with_norms and task not in self.norms:
            self.norms[task] = lowrank.norm(factors.b, factors.a)
        return factors

    def __iter__(self) -> Iterator[LoRAFactors]:
        return (self[index] for index in range(len(self)))


def inputs_of(
    order: "MergeOrder", module: str, read: ReadFactors, *, with_norms: bool
) -> tuple[Inputs, ModuleContext, dict[str, Any]]:
    """Return a module's factors, its context, and `evidence=` if the method takes any."""
    tasks = order.present[module]
    context = ModuleContext(module, tasks, order.tasks, order.seed, order.statistics)
    row = METHODS[order.method]
    extra: dict[str, Any] = {}
    if "evidence" in inspect.signature(row.function).parameters:
        found = order.evidence and order.evidence.of(module, row.takes, order.tasks)
        extra["evidence"] = found or None
    return Inputs(tasks, module, read, with_norms=with_norms), context, extra
