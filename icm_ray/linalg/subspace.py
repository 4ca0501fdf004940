"""Row spaces: orthonormal bases and how much of a vector lies outside of one."""

import torch
from jaxtyping import Float
from torch import Tensor

RATIO_FLOOR = 1e-6
"""Smallest value under the root: rounding must give neither NaN nor an infinite gradient."""


def row_space(a: Float[Tensor, "rank d_in"], tolerance: float = 1e-6) -> Float[Tensor, "d_in q"]:
    """Return an orthonormal basis of the rows of `a`, float32, with q their numerical rank.

    An SVD in float64 finds the rank, so scaling `a`, repeating rows or mixing them by any
    invertible matrix changes nothing.
    """
    _, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    keep = s > tolerance * s.max().clamp(min=torch.finfo(torch.float64).tiny)
    return vh[keep].T.float().contiguous()


def null_space_ratio(
    z: Float[Tensor, "tokens d_in"], basis: Float[Tensor, "d_in q"]
) -> Float[Tensor, " tokens"]:
    """Return the share of each row's length that lies outside of the row space, in [0, 1].

    Paper: arXiv 2603.26317, Eq. 1 to 6: `sqrt(1 - ||Q^T z||^2 / ||z||^2)` with Q orthonormal.
    Differs: the value under the root is clamped, which the reference leaves to rounding.
    """
    z = z.float()
    inside = (z @ basis).square().sum(-1) / z.square().sum(-1).clamp(min=1e-12)
    return (1 - inside).clamp(min=RATIO_FLOOR, max=1.0).sqrt()
