"""The k-th smallest magnitude of values that are never held together, exactly.

The bits of a non-negative float32, read as a whole number, are in the order of the floats. So two
sweeps find a k-th value: the first counts the upper 15 bits, the second counts the lower 16 bits
of the values that share the upper bits of the one looked for. Counts are whole numbers and add
up in any order, so any split of the values over blocks, modules or workers finds the same float.

    counts = no_counts(tasks, HIGH_BINS)
    for block in blocks:
        count_high(block, counts)
    high, place = pick(counts, place)      # and the same with count_low, LOW_BINS
    magnitude(high, low)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icm_ray.linalg import kernels

LOW_BITS = 16
HIGH_BINS = 2**15
LOW_BINS = 2**LOW_BITS
MAGNITUDE = 0x7FFFFFFF  # every bit but the sign
UPPER = MAGNITUDE - (LOW_BINS - 1)


def no_counts(tasks: int, bins: int) -> Int[Tensor, "tasks bins"]:
    """Return counts to start from, int64."""
    return torch.zeros(tasks, bins, dtype=torch.int64)


def count_high(values: Float[Tensor, "tasks ..."], counts: Int[Tensor, "tasks high"]) -> None:
    """Add each task's magnitudes, by their upper 15 bits, to `counts`."""
    bits = _bits(values)
    loop = kernels.loop_for(bits, kernels.count_high)
    if loop is not None:
        loop(bits.numpy(), counts.numpy())
        return
    for row, count in zip(bits, counts, strict=True):
        count += torch.bincount((row & MAGNITUDE) >> LOW_BITS, minlength=HIGH_BINS)


def count_low(
    values: Float[Tensor, "tasks ..."],
    high: Int[Tensor, " tasks"],
    counts: Int[Tensor, "tasks low"],
) -> None:
    """Add each task's magnitudes with the upper bits `high`, by their lower 16 bits."""
    bits = _bits(values)
    loop = kernels.loop_for(bits, kernels.count_low)
    if loop is not None:
        loop(bits.numpy(), high.numpy(), counts.numpy())
        return
    # numpy selects by a mask several times faster than torch does on a processor.
    rows = bits.numpy() if bits.device.type == "cpu" else bits
    for row, upper, count in zip(rows, high.tolist(), counts, strict=True):
        inside = row[(row & UPPER) == upper << LOW_BITS] & (LOW_BINS - 1)
        count += torch.bincount(torch.as_tensor(inside), minlength=LOW_BINS)


def pick(
    counts: Int[Tensor, "tasks bins"], place: Int[Tensor, " tasks"]
) -> tuple[Int[Tensor, " tasks"], Int[Tensor, " tasks"]]:
    """Return each task's bin with the `place`-th smallest value, and its place inside that bin.

    Args:
        counts: Of `count_high`, or of `count_low` with the place the first pick returned.
        place: From 1 to the sum of the counts; 0 gives bin 0 and place 0, below every value.
    """
    reached = counts.cumsum(1)
    found = torch.searchsorted(reached, place[:, None])
    before = reached.gather(1, found) - counts.gather(1, found)
    return found[:, 0], place - before[:, 0]


def magnitude(high: Int[Tensor, " tasks"], low: Int[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
    """Return the float32 whose upper and lower bits the two picks found."""
    return ((high << LOW_BITS) | low).int().view(torch.float32)


def _bits(values: Float[Tensor, "tasks ..."]) -> Int[Tensor, "tasks n"]:
    return values.flatten(1).contiguous().view(torch.int32)
