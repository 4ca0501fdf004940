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
    keep = s > tolerance * s[:1]  # descending; nothing to compare with if there are no rows
    return vh[keep].T.float().contiguous()


def axis_ratios(basis: Float[Tensor, "d_in q"]) -> Float[Tensor, " d_in"]:
    """Return the null-space ratio of each coordinate axis: what the input of an embedding is."""
    return (1 - basis.square().sum(-1)).clamp(min=RATIO_FLOOR, max=1.0).sqrt()


def null_space_ratio(
    z: Float[Tensor, "tokens d_in"], basis: Float[Tensor, "d_in q"]
) -> Float[Tensor, " tokens"]:
    """Return the share of each row's length that lies outside of the row space, in [0, 1].

    Paper: arXiv 2603.26317, Eq. 1 to 6: `sqrt(1 - ||Q^T z||^2 / ||z||^2)` with Q orthonormal.
    Differs: the value under the root is clamped, which the reference leaves to rounding.
    """
    z = z.float()
    length = z.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    inside = (z / length @ basis).square().sum(-1)
    return (1 - inside).clamp(min=RATIO_FLOOR, max=1.0).sqrt()
