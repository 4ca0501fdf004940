"""Gram matrices: of whole deltas, and of a module's inputs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg.lowrank import inner


def inner_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "tasks tasks"]:
    """Return the Frobenius inner products of the products `b_k @ a_k`, float64.

    Args:
        pairs: One `(b_k, a_k)` a task; all with the same `d_out` and `d_in`, any ranks.

    Cost: O(R^2 (d_out + d_in)) with R the sum of ranks; no product is formed.
    """
    gram = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for i, (b_i, a_i) in enumerate(pairs):
        for j, (b_j, a_j) in enumerate(pairs[: i + 1]):
            gram[i, j] = gram[j, i] = inner(b_i, a_i, b_j, a_j)
    return gram


def damped(
    gram: Float[Tensor, "d_in d_in"], rho: float, ridge: float
) -> Float[Tensor, "d_in d_in"]:
    """Return a Gram in float64, off-diagonals times `rho`, diagonal raised by a share of its mean.

    Args:
        gram: Symmetric, not negative.
        rho: Factor of the off-diagonal entries, in [0, 1]; below 1 no direction is left empty that
            has a feature in it.
        ridge: Share of the mean diagonal entry that is added to every diagonal entry.
    """
    out = gram.to(torch.float64, copy=True).mul_(rho)
    diagonal = gram.diagonal().double()
    out.diagonal().copy_(diagonal + ridge * diagonal.mean())
    return out
