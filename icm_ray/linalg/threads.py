"""A fixed number of kernel threads, so that results do not depend on where they are made."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def kernel_threads(count: int) -> Iterator[None]:
    """Run the body with `count` intra-op threads and restore the previous number.

    Sums are split over threads, so another number of threads rounds differently; every path that
    promises equal bytes runs under the same count.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
