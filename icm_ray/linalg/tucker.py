"""Two bases that several matrices share: Tucker-2, fitted by higher-order orthogonal iteration."""

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDS = 300
"""At most; most stacks of adapters need some dozens."""

SETTLED = 1e-14
"""Share of all energy that a round must still gain; bases are then right to about 1e-6."""


def shared_bases(
    matrices: Float[Tensor, "tasks p q"], rank: int
) -> tuple[Float[Tensor, "p r"], Float[Tensor, "q s"]]:
    """Return orthonormal `(u, v)` that keep as much of `sum_k |u.T @ m_k @ v|^2` as is found.

    Starts from the leading right singular vectors of all matrices one above the other, then takes
    the leading left ones of all `m_k @ v` side by side as u, those of all `m_k.T @ u` as v, and so
    on: no round loses any. Columns come by descending singular value, up to a sign each.

    Args:
        matrices: Float64.
        rank: At least 1; r and s are it, or the side where that is shorter.

    Cost: O(tasks p q r + p^3 + q^3) a round, at most 300 rounds.
    """
    v, _ = _leading(matrices.mT, rank)
    u, _ = _leading(matrices @ v, rank)
    kept, least = 0.0, SETTLED * float(matrices.square().sum())
    for _ in range(ROUNDS):
        v, energy = _leading(matrices.mT @ u, rank)
        if energy - kept <= least:
            break
        kept = energy
        u, _ = _leading(matrices @ v, rank)
    return u, v


def _leading(x: Float[Tensor, "tasks n m"], rank: int) -> tuple[Float[Tensor, "n r"], float]:
    """Return the leading left singular vectors of `[x_1 .. x_K]`, and their energy."""
    squares, vectors = torch.linalg.eigh((x @ x.mT).sum(0))
    return vectors.flip(1)[:, :rank], float(squares[-rank:].sum())
