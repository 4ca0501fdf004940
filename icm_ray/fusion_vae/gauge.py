"""The many ways to write one delta as `b @ a`, and the one that stands for all of them."""

import numpy as np
import torch

from icm_ray.linalg.lowrank import svd
from icm_ray.types import LoRAFactors


def balanced(factors: LoRAFactors, like: LoRAFactors | None = None) -> LoRAFactors:
    """Return the same delta as `u sqrt(s)` and `sqrt(s) v`, ranks by size, signs fixed.

    `(b g^-1, g a)` is one delta for every invertible g, but as many vectors; an average of such
    vectors is no average of deltas. Numerically zero ranks are left out.

    Args:
        factors: Any split of the delta.
        like: A balanced neighbour, such as the next checkpoint: ranks are matched to its ranks and
            signs to its signs, so that a trajectory changes smoothly. None puts the entry of
            largest magnitude of every row of `a` above zero.
    """
    spectrum = svd(factors.b, factors.a)
    b, a = spectrum.factors(spectrum.s.numel())
    if len(a) == 0:
        return LoRAFactors(a, b)
    if like is None or like.rank == 0:
        signs = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
        return LoRAFactors(a * signs, b * signs.T)
    return _aligned(a, b, like)


def _aligned(a: torch.Tensor, b: torch.Tensor, like: LoRAFactors) -> LoRAFactors:
    """Return ranks in the order and with the signs of the rows of `like` they resemble most."""
    from scipy.optimize import (
        linear_sum_assignment,  # .3 s that few commands need
    )

    products = (a @ like.a.T) * (b.T @ like.b)  # of both sides: a sign cancels between them
    rows, columns = linear_sum_assignment(-products.abs().double().numpy())
    free = sorted(set(range(len(a))) - set(rows.tolist()))
    order = np.concatenate([rows[np.argsort(columns)], np.array(free, dtype=int)])
    a, b = a[order], b[:, order]
    matched = np.sort(columns)
    signs = torch.ones(len(a), 1)
    signs[: len(matched), 0] = (a[: len(matched)] * like.a[matched]).sum(1).sign()
    signs[signs == 0] = 1.0
    return LoRAFactors(a * signs, b * signs.T)


def padded(factors: LoRAFactors, rank: int) -> LoRAFactors:
    """Return the same delta with zero ranks added up to `rank`."""
    missing = rank - factors.rank
    a = torch.nn.functional.pad(factors.a, (0, 0, 0, missing))
    return LoRAFactors(a, torch.nn.functional.pad(factors.b, (0, missing)))
