"""Sweeps over blocks as compiled loops, for those who install the extra `kernels` (numba).

Each has a twin in torch or numpy next to its only call. Both add tasks up one after another in
float32, without fast-math, so they give the same bits and nobody needs to know which one ran.
Arrays are C-contiguous; `least` is a task's threshold, `n` the entries of a block.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1024  # entries whose sums stay in the first-level cache
ZERO, ONE = np.float32(0), np.float32(1)
MAGNITUDE = np.int32(0x7FFFFFFF)  # every bit of a float32 but its sign
MIX = np.array([0x9E3779B9, 0x7FEB352D, 0x846CA68B], np.uint32)
"""Multipliers of the mixing in `drop`: the golden ratio and the pair of Wellons' lowbias32."""


@cache
def compiled(loop: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the machine code of one of the loops below, or None where numba is missing."""
    try:
        import numba
    except ImportError:
        return None
    plain = inspect.unwrap(loop)  # tests wrap every function to check its types
    try:
        return numba.njit(cache=True)(plain)
    except RuntimeError:  # no folder it may write to: compile again in every process
        return numba.njit(plain)


def loop_for(values: Tensor, loop: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a loop's machine code where it can run: over values in the processor's memory."""
    return compiled(loop) if values.device.type == "cpu" else None


def count_digit(
    bits: NDArray[Any], above: NDArray[Any], shift: int, width: int, counts: NDArray[Any]
) -> None:
    """Add magnitudes `(tasks, n)`, read as int32, to counts by `width` bits above the last `shift`.

    Only magnitudes whose still higher bits are the task's `above` count.
    """
    for task in range(bits.shape[0]):
        row, count, upper = bits[task], counts[task], above[task]
        for j in range(row.shape[0]):
            rest = (row[j] & MAGNITUDE) >> shift
            if rest >> width == upper:
                count[rest & ((1 << width) - 1)] += 1


def count_near(bits: NDArray[Any], start: NDArray[Any], counts: NDArray[Any]) -> None:
    """Add magnitudes `(tasks, n)`, read as int32, to counts: below `start`, then each from there.

    Magnitudes beyond the last column do not count. Few of them are near, and eight that are not
    are passed over at once.
    """
    n, width = bits.shape[1], np.uint32(counts.shape[1] - 1)
    is_near = np.zeros(CHUNK, np.uint8)
    eights = is_near.view(np.uint64)
    for task in range(bits.shape[0]):
        row, count, first = bits[task], counts[task], np.int32(start[task])
        for begin in range(0, n, CHUNK):
            size = min(CHUNK, n - begin)
            part = row[begin : begin + size]
            below = np.int32(0)
            for j in range(size):  # two loops: each is SIMD by itself
                below += np.int32(np.int32(part[j] & MAGNITUDE) < first)
            count[0] += below
            for j in range(size):
                is_near[j] = np.uint32(np.int32(part[j] & MAGNITUDE) - first) < width
            is_near[size:] = 0
            for eight in range(CHUNK // 8):
                if eights[eight] != 0:
                    for j in range(8 * eight, 8 * eight + 8):
                        if is_near[j]:
                            count[1 + np.int32(part[j] & MAGNITUDE) - first] += 1


def sum_of_signs(
    values: NDArray[Any], least: NDArray[Any], before: NDArray[Any], by_signs: bool
) -> int:
    """Return the sum over all entries of the sign that `vote` elects, 0 where tasks cancel."""
    tasks, n = values.shape
    total = np.empty(CHUNK, np.float32)
    result = 0
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        total[:] = ZERO
        for task in range(tasks):
            row, low, factor = values[task, start : start + size], least[task], before[task]
            for j in range(size):
                x = row[j] * factor if abs(row[j]) >= low else ZERO
                total[j] += np.float32(x > 0) - np.float32(x < 0) if by_signs else x
        for j in range(size):
            result += int(total[j] > 0) - int(total[j] < 0)
    return result


def vote(
    values: NDArray[Any],
    least: NDArray[Any],
    before: NDArray[Any],
    after: NDArray[Any],
    shares: NDArray[Any],
    by_signs: bool,
    zero: np.float32,
    out: NDArray[Any],
) -> None:
    """Trim, elect and put together `(tasks, n)` entries; see `consensus.Vote` for the numbers."""
    tasks, n = values.shape
    total, sign, share = np.empty((3, CHUNK), np.float32)
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        total[:] = ZERO
        for task in range(tasks):
            row, low, factor = values[task, start : start + size], least[task], before[task]
            for j in range(size):
                x = row[j] * factor if abs(row[j]) >= low else ZERO
                total[j] += np.float32(x > 0) - np.float32(x < 0) if by_signs else x
        for j in range(size):
            sign[j] = ONE if total[j] > 0 else (-ONE if total[j] < 0 else zero)
        total[:] = ZERO
        share[:] = ZERO
        for task in range(tasks):
            row, low, factor = values[task, start : start + size], least[task], before[task]
            times, part = after[task], shares[task]  # read in the loop they keep it from SIMD
            for j in range(size):
                x = row[j] * factor if abs(row[j]) >= low else ZERO
                x *= sign[j]
                total[j] += x * times if x > 0 else ZERO
                share[j] += part if x > 0 else ZERO
        for j in range(size):
            out[start + j] = total[j] * sign[j] / (share[j] if share[j] != 0 else ONE)


def drop(values: NDArray[Any], keys: NDArray[Any], bound: np.uint32, factor: np.float32) -> None:
    """Multiply entries `(rows, d_in)` by `factor` if their draw is below `bound`, else by 0.

    The draw is that of `sparsify.draws`.
    """
    for i in range(values.shape[0]):
        row, first, second = values[i], keys[i, 0], keys[i, 1]
        for j in range(row.shape[0]):
            x = np.uint32(np.uint32(j) * MIX[0] + first)  # numba's products are 64 bits wide
            x = np.uint32((x ^ (x >> np.uint32(16))) * MIX[1])
            x = np.uint32((x ^ (x >> np.uint32(15)) ^ second) * MIX[2])
            x = np.uint32(x ^ (x >> np.uint32(16)))
            row[j] *= factor if x < bound else ZERO
