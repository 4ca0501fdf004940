"""The exact weighted sum of deltas that six methods share."""

from collections.abc import Sequence

from torch import Tensor

from icm_ray.linalg.lowrank import stack
from icm_ray.types import Delta, LoRAFactors

STACKED_ENTRIES = 2**22
"""Stacked factors of so many entries (17 MB) are added up once they outweigh the delta."""


def weighted_sum(factors: Sequence[LoRAFactors], weights: Sequence[float]) -> LoRAFactors | Delta:
    """Return `sum_k weights[k] * delta_k`, exactly: stacked, or dense once that is smaller.

    Factors are asked for one task at a time, so memory does not grow with the number of tasks
    beyond the delta's own size.

    Args:
        factors: One per task present in the module; equal `d_out` and `d_in`, any ranks.
        weights: One per entry of `factors`, any sign.

    Returns:
        Factors of rank `sum_k rank_k` (tasks of weight zero left out), float32; or the dense sum,
        if there are so many tasks that their factors outweigh it.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    numbers: list[float] = []
    total: Tensor | None = None
    for one, weight in zip(factors, weights, strict=True):
        pairs.append((one.b, one.a))
        numbers.append(weight)
        entries = sum(b.numel() + a.numel() for b, a in pairs)
        if entries > STACKED_ENTRIES and entries > one.b.shape[0] * one.a.shape[1]:
            total = _added(total, pairs, numbers)
            pairs, numbers = [], []
    if total is None:
        b, a = stack(pairs, numbers)
        return LoRAFactors(a, b)
    return Delta.of(_added(total, pairs, numbers) if pairs else total)


def _added(
    total: Tensor | None, pairs: Sequence[tuple[Tensor, Tensor]], numbers: Sequence[float]
) -> Tensor:
    b, a = stack(pairs, numbers)
    return b @ a if total is None else total.addmm_(b, a)
