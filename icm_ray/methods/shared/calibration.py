"""The step before a method: directions of A or of B that many adapters crowd are weakened."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg.shared_basis import Basis, basis_of
from icm_ray.linalg.subspace import row_space
from icm_ray.types import LoRAFactors


def calibrated(
    factors: Sequence[LoRAFactors], side: Literal["a", "b", "measured"]
) -> list[LoRAFactors]:
    """Weaken the directions of one side that several tasks use: `x_k + U diag(c - 1) U^T x_k`.

    `[x_1 .. x_K] = U diag(s) V^T` are the B side by side, or the A transposed;
    `c_j = 1 / (1 + (K - 1) s_j^2 / sum s^2)`. K counts the tasks with a change, and one alone is
    left as it is.

    Paper: arXiv 2604.16826, on B. Differs: adapters of one initialisation crowd A and not B, so
    either side may be chosen, or measured: the one whose spans coincide more (mean squared cosine
    of the principal angles of each two tasks, in this module). Like the paper's, it looks at
    factors as they are, so how a delta is split into B and A counts. What norm it takes
    `restore_norm` gives back.

    Cost: O(R^2 (d_out + d_in)); holds a module of all adapters.
    """
    ranks = [f.rank for f in factors]
    sides = {"a": torch.cat([f.a for f in factors]).T, "b": torch.cat([f.b for f in factors], 1)}
    bases = {name: basis_of(stack) for name, stack in sides.items()}
    if side == "measured":
        side = "a" if _overlap(bases["a"], ranks) > _overlap(bases["b"], ranks) else "b"
    basis = bases[side]
    tasks = sum(bool(f.a.any() and f.b.any()) for f in factors)
    shares = basis.s.square() / basis.s.square().sum()
    change = 1 / (1 + (tasks - 1) * shares) - 1 if tasks else torch.zeros_like(shares)
    moved = basis.product(change[:, None] * basis.coordinates)
    parts = zip(factors, moved.split(ranks, dim=1), strict=True)
    if side == "a":
        return [LoRAFactors(f.a + part.T, f.b, f.scaling) for f, part in parts]
    return [LoRAFactors(f.a, f.b + part, f.scaling) for f, part in parts]


def _overlap(basis: Basis, ranks: list[int]) -> float:
    """Return how far the tasks' spans coincide: 0 not at all, 1 wholly."""
    spans: list[Float[Tensor, "q own"]] = [
        row_space(own.T) for own in basis.coordinates.split(ranks, dim=1)
    ]
    found = [
        float((x.T @ y).square().sum()) / min(x.shape[1], y.shape[1])
        for x, y in combinations([span for span in spans if span.shape[1]], 2)
    ]
    return sum(found) / len(found) if found else 0.0
