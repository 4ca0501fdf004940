"""Which entries magnitude keeps, over a whole adapter or one module, without holding either."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icm_ray.linalg import radix
from icm_ray.linalg.consensus import sum_of_signs
from icm_ray.linalg.radix import Digit
from icm_ray.methods.shared.parameters import task_weights
from icm_ray.methods.table import Pass
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence

Entries = Callable[..., Iterator[Tensor]]
"""`(factors, context, evidence, **params)` yielding one module's values block by block: float32
`(tasks, rows, cols)`, tasks in the order of the factors, weights not yet applied. Every call yields
the same bits, and a block is read before the next one is asked for."""


SAMPLED = 32
"""One row in so many is enough to guess a threshold; a wrong guess costs a sweep more than none."""
LEAST_SAMPLE = 2**22
"""Of fewer values a guess is too often wrong, and two sweeps over all of them are quick."""


def trim_passes(entries: Entries, density: float, *, by_rows: bool = False) -> tuple[Pass, ...]:
    """Return the passes of the original TIES over values of any space.

    They leave in `context.statistics`

        threshold   float32 `(all tasks,)`: a task keeps `abs(value) >= threshold`. With D values
                    over all modules, those of modules it lacks counted as zeros, the threshold is
                    its k-th smallest magnitude, `k = D - int(D * density)`; 0 if k is 0.
        majority    int64 scalar: over all values of all modules, the sum of the signs of
                    `sum_k weight_k * kept_k`. Its sign stands in where kept values cancel.

    `weights` among the method's parameters multiply after the trim and before the election; none
    are ones. Use it in `passes` beside the method; in the method, `thresholds(context)` and
    `majority_sign(context)` read what was found.

    Args:
        entries: Yields a module's values; called with the method's own parameters.
        density: Share to keep, in [0, 1]; 1 spares the passes that find the threshold.
        by_rows: Whether rows of the values are made from the same rows of the factors' `b`, so that
            a part of them is cheap: it spares one of the two large sweeps.
    """
    last = Pass(partial(_count_signs, entries), partial(_conclude_signs, density < 1))
    if density >= 1:
        return (last,)
    digits = [
        Pass(
            partial(_count_digit, entries, number),
            partial(_conclude_digit, density, number),
            # Few tasks need two; after a guess that was right, none.
            share=0.0 if by_rows or number > 1 else 1.0,
        )
        for number in range(radix.MOST_DIGITS)
    ]
    if not by_rows:
        return *digits, last
    some = Pass(partial(_count_some, entries), partial(_conclude_some, density), 1 / SAMPLED)
    near = Pass(partial(_count_near, entries), partial(_conclude_near, density))
    return some, near, *digits, last


def thresholds(context: ModuleContext) -> Float[Tensor, " tasks"]:
    """Return the threshold of each present task; 0, which keeps all, before any was found."""
    found = context.statistics.get("threshold")
    return torch.zeros(len(context.tasks)) if found is None else found[context.rows]


def majority_sign(context: ModuleContext) -> int:
    """Return the sign most entries elected: -1, 0 or 1."""
    return int(context.statistics["majority"].sign())


def of_module_alone(
    passes: Sequence[Pass],
    factors: Sequence[LoRAFactors],
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    **params: Any,
) -> ModuleContext:
    """Return a context whose statistics are those of this module and no other."""
    for one in passes:
        measured = one.measure(factors, context=context, evidence=evidence, **params)
        known = context.statistics
        found = one.conclude(measured, tasks=context.all_tasks, statistics=known, **params)
        context = replace(context, statistics={**known, **found})
    return context


def _count_digit(
    entries: Entries,
    number: int,
    /,
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    tasks = len(context.all_tasks)
    digits = radix.digits_for(tasks)
    if number >= len(digits) or "threshold" in context.statistics:
        return {}  # all is known already, and no factor is read
    digit = digits[number]
    above = context.statistics.get("above", radix.no_digits(tasks))
    counts = radix.no_counts(len(factors), digit)
    size = 0
    for block in entries(factors, context, evidence, **params):
        size += block[0].numel()
        radix.count(block, above[context.rows], digit, counts)
    total = radix.no_counts(tasks, digit)
    total[above == 0, 0] = size  # a task without the module has as many zeros
    total[context.rows] = counts
    return {"counts": total}


def _conclude_digit(
    density: float,
    number: int,
    /,
    total: Mapping[str, Tensor],
    *,
    tasks: Sequence[str],
    statistics: Mapping[str, Tensor],
    **_params: Any,
) -> dict[str, Tensor]:
    digits = radix.digits_for(len(tasks))
    if number >= len(digits) or "threshold" in statistics:
        return {}
    above, place = statistics.get("above"), statistics.get("place")
    if above is None or place is None:
        above = radix.no_digits(len(tasks))
        place = _place(int(total["counts"][0].sum()), density, len(tasks))
    above, place = radix.pick(total["counts"], above, place)
    found = {"above": above, "place": place}
    return {"threshold": radix.magnitude(above)} if number == len(digits) - 1 else found


def _count_some(
    entries: Entries,
    /,
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    **params: Any,
) -> Mapping[str, Tensor]:
    if evidence or len(context.all_tasks) > radix.FEW_TASKS:
        return {}  # no guess, so the digits are counted
    some = [replace(one, b=one.b[::SAMPLED]) for one in factors]
    return _count_digit(entries, 0, some, context=context, **params)


def _conclude_some(
    density: float, /, total: Mapping[str, Tensor], *, tasks: Sequence[str], **_rest: Any
) -> dict[str, Tensor]:
    size = int(total["counts"][0].sum()) if total else 0
    if size < LEAST_SAMPLE:
        return {}
    return {"start": radix.guess(total["counts"], _place(size, density, len(tasks)))}


def _count_near(
    entries: Entries,
    /,
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    start = context.statistics.get("start")
    if start is None:
        return {}
    counts, size = radix.no_counts_near(len(factors)), 0
    for block in entries(factors, context, evidence, **params):
        size += block[0].numel()
        radix.count_near(block, start[context.rows], counts)
    total = radix.no_counts_near(len(start))
    total[start > 0, 0] = size  # a task without the module has as many zeros
    total[start == 0, 1] = size
    total[context.rows] = counts
    return {"counts": total, "size": torch.tensor(size)}


def _conclude_near(
    density: float,
    /,
    total: Mapping[str, Tensor],
    *,
    tasks: Sequence[str],
    statistics: Mapping[str, Tensor],
    **_params: Any,
) -> dict[str, Tensor]:
    if "start" not in statistics:
        return {}
    place = _place(int(total["size"]), density, len(tasks))
    found = radix.pick_near(total["counts"], statistics["start"], place)
    return {} if found is None else {"threshold": found}


def _place(size: int, density: float, tasks: int) -> Int[Tensor, " tasks"]:
    """Return the place of each task's threshold among so many values, from 1; 0 keeps them all."""
    return torch.full((tasks,), size - int(size * density))


def _count_signs(
    entries: Entries,
    /,
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    least, by = thresholds(context), params.get("election") or "values"
    numbers = task_weights(context, params.get("weights"), default=1.0)
    weights = torch.tensor(numbers, dtype=torch.float32)
    blocks = entries(factors, context, evidence, **params)
    return {
        "majority": torch.tensor(sum(sum_of_signs(block, least, weights, by) for block in blocks))
    }


def _conclude_signs(
    trimmed: bool, /, total: Mapping[str, Tensor], *, tasks: Sequence[str], **_params: Any
) -> dict[str, Tensor]:
    nothing = {} if trimmed else {"threshold": torch.zeros(len(tasks))}
    return {"majority": total["majority"], **nothing}


@dataclass(frozen=True)
class ExactTrim:
    """The same number of entries of each task.

    Attributes:
        least: Threshold of each task.
        equal: How many of the entries equal to the threshold are kept, the first ones; -1 for all.
    """

    least: Float[Tensor, " tasks"]
    equal: Int[Tensor, " tasks"]

    def of(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield blocks with 0 in place of all that is not kept; they are changed in place."""
        least = self.least[:, None, None]
        for block in self.without_surplus(blocks):
            yield block.masked_fill_(block.abs() < least, 0.0)

    def without_surplus(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield blocks in which dropping what is below `least` is all that is left to do."""
        left = self.equal.tolist()
        limited = [task for task, count in enumerate(left) if count >= 0]
        for block in blocks:
            for task in limited:
                entries = block[task].view(-1)
                equal = (entries.abs() == self.least[task]).nonzero()[:, 0]
                entries[equal[left[task] :]] = 0.0
                left[task] -= min(left[task], len(equal))
            yield block


def exactly(
    blocks: Callable[[], Iterator[Tensor]], tasks: int, count_of: Callable[[int], int]
) -> ExactTrim:
    """Find the thresholds that keep exactly so many entries of each task of one module.

    Args:
        blocks: Starts a pass over the module's values, `(tasks, rows, cols)` each, the same bits
            every time.
        tasks: Number of tasks.
        count_of: Gives the number to keep, from 0 to the number of values it is called with.
    """
    digits, above = radix.digits_for(tasks), radix.no_digits(tasks)
    counts = _counted(blocks(), above, digits[0])
    size = int(counts[0].sum())
    kept = count_of(size)
    if kept == 0:
        return ExactTrim(torch.full((tasks,), torch.inf), torch.full((tasks,), -1))
    above, place = radix.pick(counts, above, torch.full((tasks,), size - kept + 1))
    for digit in digits[1:]:
        counts = _counted(blocks(), above, digit)
        above, place = radix.pick(counts, above, place)
    equal = counts.gather(1, (above % counts.shape[1])[:, None])[:, 0]
    # Places count from the smallest, so the first one in its bin keeps all that are equal.
    return ExactTrim(radix.magnitude(above), torch.where(place == 1, -1, equal - place + 1))


def _counted(
    blocks: Iterator[Tensor], above: Int[Tensor, " tasks"], digit: Digit
) -> Int[Tensor, "tasks bins"]:
    """Return the counts of all blocks of a module."""
    total = radix.no_counts(len(above), digit)
    for block in blocks:
        radix.count(block, above, digit, total)
    return total
