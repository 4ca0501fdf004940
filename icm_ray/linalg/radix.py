"""The k-th smallest magnitude of values that are never held together, exactly.

The bits of a non-negative float32, read as a whole number, are in the order of the floats. So a few
sweeps find a k-th value, one digit of these bits after another from the top: each counts, of the
values that begin with the digits found so far, how often the next digit is what. Counts are whole
numbers and add up in any order, so any split of the values over blocks, modules or workers finds
the same float.

    above, place = no_digits(tasks), ...
    for digit in digits_for(tasks):
        counts = no_counts(tasks, digit)
        for block in blocks:
            count(block, above, digit, counts)
        above, place = pick(counts, above, place)
    magnitude(above)

Some of the values are enough to `guess` where the k-th lies, and then one sweep does for two:
`count_near` counts what is below and, one by one, what is about the guess, and `pick_near` says
whether the k-th was there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icm_ray.linalg import kernels

MAGNITUDE = int(kernels.MAGNITUDE)
FEW_TASKS = 32
"""Up to so many tasks, two sweeps with large counts: 768 kB a task. More take three: 24 kB."""


@dataclass(frozen=True)
class Digit:
    """Some neighbouring bits of a magnitude: `width` of them, above the last `shift`."""

    shift: int
    width: int

    @property
    def bins(self) -> int:
        """Number of values that the digit can have."""
        return 1 << self.width


_TWO = (Digit(16, 15), Digit(0, 16))
_THREE = (Digit(20, 11), Digit(10, 10), Digit(0, 10))
MOST_DIGITS = len(_THREE)


def digits_for(tasks: int) -> tuple[Digit, ...]:
    """Return the digits that sweeps over so many tasks count, from the top; any find the same."""
    return _TWO if tasks <= FEW_TASKS else _THREE


def most_bins(tasks: int) -> int:
    """Return the largest number of counts that a sweep over so many tasks keeps for each."""
    return max(digit.bins for digit in digits_for(tasks))


def no_digits(tasks: int) -> Int[Tensor, " tasks"]:
    """Return what is known before the first digit."""
    return torch.zeros(tasks, dtype=torch.int64)


def no_counts(tasks: int, digit: Digit) -> Int[Tensor, "tasks bins"]:
    """Return counts to start from, int64."""
    return torch.zeros(tasks, digit.bins, dtype=torch.int64)


def count(
    values: Float[Tensor, "tasks ..."],
    above: Int[Tensor, " tasks"],
    digit: Digit,
    counts: Int[Tensor, "tasks bins"],
) -> None:
    """Add each task's magnitudes that begin with the digits `above` to `counts`, by this digit."""
    bits = _bits(values)
    loop = kernels.loop_for(bits, kernels.count_digit)
    if loop is not None:
        loop(bits.numpy(), above.numpy(), digit.shift, digit.width, counts.numpy())
        return
    for row, upper, total in zip(bits, above.tolist(), counts, strict=True):
        found = (row & MAGNITUDE) >> digit.shift
        if digit.shift + digit.width < 31:
            rest = _on_processor(found)
            found = torch.as_tensor(rest[rest >> digit.width == upper] & (digit.bins - 1))
        total += torch.bincount(found, minlength=digit.bins)


def pick(
    counts: Int[Tensor, "tasks bins"], above: Int[Tensor, " tasks"], place: Int[Tensor, " tasks"]
) -> tuple[Int[Tensor, " tasks"], Int[Tensor, " tasks"]]:
    """Return the digits so far of each task's `place`-th smallest value, and its place among these.

    Args:
        counts: Of `count`, whose number of bins is a power of two.
        above: The digits that were known when they were counted.
        place: From 1 to the sum of the counts; 0 gives digit 0 and place 0, below every value.
    """
    reached = counts.cumsum(1)
    found = torch.searchsorted(reached, place[:, None])
    before = reached.gather(1, found) - counts.gather(1, found)
    return above * counts.shape[1] + found[:, 0], place - before[:, 0]


NEAR = 1 << 15
"""Magnitudes about a guess, one bin each: some .4 % of it."""


def guess(counts: Int[Tensor, "tasks bins"], place: Int[Tensor, " tasks"]) -> Int[Tensor, " tasks"]:
    """Return the bits of the first of `NEAR` magnitudes about what is likely the place-th smallest.

    Args:
        counts: Of the first of two digits, over some of the values.
        place: Among these.
    """
    digit, left = pick(counts, no_digits(len(counts)), place)
    share = left / counts.gather(1, digit[:, None])[:, 0].clamp(min=1)
    share = share.where(digit > 0, 0.0)  # among the smallest of all, most are zeros
    return (((digit + share) * (1 << _TWO[0].shift)).long() - NEAR // 2).clamp(min=0)


def no_counts_near(tasks: int) -> Int[Tensor, "tasks bins"]:
    """Return counts to start from: those below the first magnitude, then `NEAR` of one each."""
    return torch.zeros(tasks, 1 + NEAR, dtype=torch.int64)


def count_near(
    values: Float[Tensor, "tasks ..."],
    start: Int[Tensor, " tasks"],
    counts: Int[Tensor, "tasks bins"],
) -> None:
    """Add each task's magnitudes to `counts` of `no_counts_near`; those beyond do not count."""
    bits = _bits(values)
    loop = kernels.loop_for(bits, kernels.count_near)
    if loop is not None:
        loop(bits.numpy(), start.numpy(), counts.numpy())
        return
    for row, first, total in zip(bits, start.tolist(), counts, strict=True):
        place = _on_processor((row & MAGNITUDE) - first)
        total[0] += int((place < 0).sum())
        near = torch.as_tensor(place[(place >= 0) & (place < NEAR)])
        total[1:] += torch.bincount(near, minlength=NEAR)


def pick_near(
    counts: Int[Tensor, "tasks bins"], start: Int[Tensor, " tasks"], place: Int[Tensor, " tasks"]
) -> Float[Tensor, " tasks"] | None:
    """Return each task's `place`-th smallest magnitude, or None if one is not about its guess."""
    reached = counts.cumsum(1)
    if (place > reached[:, -1]).any() or (place <= reached[:, 0]).any():
        return None
    return magnitude(start + torch.searchsorted(reached, place[:, None])[:, 0] - 1)


def magnitude(above: Int[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
    """Return the float32 whose digits were all picked."""
    return above.int().view(torch.float32)


def _on_processor(values: Tensor) -> Any:
    """Return numpy's view where it can: its masks are several times faster than torch's."""
    return values.numpy() if values.device.type == "cpu" else values


def _bits(values: Float[Tensor, "tasks ..."]) -> Int[Tensor, "tasks n"]:
    return values.flatten(1).contiguous().view(torch.int32)
