"""Row blocks of several products `b @ a`, for what must look at every entry of a large matrix."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK_ENTRIES = 2**20
"""Float32 entries of a block over all tasks: 4 MB, which caches hold between a sweep's steps."""
LEAST_ROWS = 4
"""With hundreds of tasks a block may be larger: single rows would be all overhead."""


def block_rows(d_in: int, tasks: int) -> int:
    """Return how many rows a block has; nothing but the shapes may decide it.

    A product rounds differently in blocks of another height, and thresholds compare values that
    are computed again in every sweep.
    """
    return max(BLOCK_ENTRIES // max(tasks * d_in, 1), LEAST_ROWS)


def row_blocks(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Yield consecutive row blocks of all products, from top to bottom, the same bits every time.

    Args:
        pairs: One `(b, a)` a task, at least one: `(d_out, rank)` and `(rank, d_in)`, float32, any
            ranks.

    Yields:
        `(tasks, rows, d_in)`, contiguous; its memory is used again for the next block.
    """
    tasks, d_out, d_in = len(pairs), pairs[0][0].shape[0], pairs[0][1].shape[1]
    step = min(block_rows(d_in, tasks), d_out)
    buffer = torch.empty(tasks * step * d_in)
    for start in range(0, d_out, step):
        rows = min(step, d_out - start)
        block = buffer[: tasks * rows * d_in].view(tasks, rows, d_in)
        for (b, a), out in zip(pairs, block, strict=True):
            torch.mm(b[start : start + rows], a, out=out)
        yield block
