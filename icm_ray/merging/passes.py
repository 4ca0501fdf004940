"""What a method must know of the whole adapter first: measured module by module, then added up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from icm_ray.devices import find_device, made_on, to_cpu
from icm_ray.linalg.threads import kernel_threads
from icm_ray.merging.inputs import ReadFactors, finite_only, inputs_of
from icm_ray.merging.order import MergeOrder
from icm_ray.methods import METHODS
from icm_ray.methods.table import Pass


@dataclass
class Measured:
    """What some modules added to one pass.

    Attributes:
        whole: Sums of whole numbers; addition in any order gives the same.
        floats: By module, numbers whose sum depends on its order; added in the order of names.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    floats: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def take(self, other: "Measured") -> None:
        """Add another part's whole numbers and empty it of them; its floats stay where they are."""
        for name, value in other.whole.items():
            self.add_whole(name, value)
        other.whole.clear()

    def add_whole(self, name: str, value: Tensor) -> None:
        """Add a tensor of whole numbers, in place where there is a sum already."""
        if name in self.whole:
            self.whole[name] += value
        else:
            self.whole[name] = value.clone()


def passes_of(order: MergeOrder) -> tuple[Pass, ...]:
    """Return the passes over all modules that come before this merge."""
    return METHODS[order.method].passes(**order.params)


def measure_modules(
    order: MergeOrder, number: int, modules: Iterable[str], read: ReadFactors
) -> Measured:
    """Measure some modules for pass `number`; any split over workers gives the same sums."""
    sums = Measured()
    measure = passes_of(order)[number].measure
    with kernel_threads(1), torch.no_grad(), made_on(find_device(order.device)):
        for module in modules:
            factors, context, extra = inputs_of(order, module, read, with_norms=False)
            with finite_only(order.method, module):
                measured = measure(factors, context=context, **extra, **order.params_at(module))
            measured = {name: to_cpu(tensor) for name, tensor in measured.items()}
            floats = {n: t for n, t in measured.items() if t.is_floating_point()}
            if floats:
                sums.floats[module] = floats
            for name in measured.keys() - floats.keys():
                sums.add_whole(name, measured[name])
    return sums


def concluded(order: MergeOrder, number: int, parts: Sequence[Measured]) -> MergeOrder:
    """Return the order with what pass `number` found out; `parts` cover every module once.

    Counts of many tasks are large, so the parts are emptied one by one.
    """
    total = Measured()
    for part in parts:
        total.take(part)
    floats = {module: values for part in parts for module, values in part.floats.items()}
    sums = dict(total.whole)
    for module in sorted(floats):
        for name, value in floats[module].items():
            sums[name] = sums[name] + value if name in sums else value
    conclude = passes_of(order)[number].conclude
    with kernel_threads(1):
        found = conclude(sums, tasks=order.tasks, statistics=order.statistics, **order.params)
    return replace(order, statistics={**order.statistics, **found})


def with_statistics(order: MergeOrder, read: ReadFactors) -> MergeOrder:
    """Run every pass in this process."""
    for number in range(len(passes_of(order))):
        order = concluded(order, number, [measure_modules(order, number, order.present, read)])
    return order
