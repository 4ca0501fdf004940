"""The nearest orthonormal vectors to a stack that is nearly, or exactly, dependent."""

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg.lowrank import NUMERICAL_RANK

GRAM_FLOOR = 1e-8
"""Smallest ratio of Gram eigenvalues at which the Gram route keeps float32 accuracy."""


def polar(x: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Return the polar factor `u @ vh` of `x = u @ diag(s) @ vh`, float64.

    For independent columns it is the matrix with orthonormal columns nearest to `x`; it treats all
    columns alike, where Gram-Schmidt would favour the first. Singular values at or below
    `NUMERICAL_RANK` of the largest become zero (a partial isometry): a direction that rounding
    alone holds must not grow to length one.

    Args:
        x: Any shape, more columns than rows included.

    Cost: O(n r^2) by the Gram matrix; twice that and an SVD of size r for dependent columns.
    """
    x = x.double()
    if x.numel() == 0:
        return x
    values, vectors = torch.linalg.eigh(x.T @ x)
    if values[0] > GRAM_FLOOR * values[-1]:
        return x @ ((vectors / values.sqrt()) @ vectors.T)
    q, r = torch.linalg.qr(x)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    keep = s > NUMERICAL_RANK * s[0]
    return q @ (u[:, keep] @ vh[keep])
