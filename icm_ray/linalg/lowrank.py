"""Exact algebra on products `b @ a`, without ever forming the large matrix they stand for.

Shapes: `b` is `(d_out, rank)`, `a` is `(rank, d_in)`. Small matrices (Grams, cores) are float64,
because a Gram matrix squares the condition number; large ones keep their dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

NUMERICAL_RANK = 1e-6
"""Singular values at or below this share of the largest one count as zero (float32 inputs)."""

CHOLESKY_FLOOR = 1e-5
"""Smallest ratio of Cholesky pivots at which the Gram route keeps float32 accuracy."""


@dataclass(frozen=True)
class LowRankSVD:
    """Thin SVD of a low-rank product: `u @ diag(s) @ vh`, numerical zeros dropped.

    Attributes:
        u: `(d_out, q)`, orthonormal columns, float64.
        s: `(q,)`, descending, positive, float64.
        vh: `(q, d_in)`, orthonormal rows, float64.
    """

    u: Float[Tensor, "d_out q"]
    s: Float[Tensor, " q"]
    vh: Float[Tensor, "q d_in"]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return float32 `(b, a)` of the best approximation of at most `rank`.

        The singular values are shared evenly (`b = u sqrt(s)`), so both factors have entries of
        similar size and survive half precision.
        """
        root = self.s[:rank].sqrt()
        b, a = self.u[:, :rank] * root, root[:, None] * self.vh[:rank]
        return b.float().contiguous(), a.float().contiguous()

    def retained_energy(self, rank: int) -> float:
        """Return the share of the squared Frobenius norm inside the first `rank` values."""
        energy = self.s.square()
        total = float(energy.sum())
        return float(energy[:rank].sum()) / total if total > 0 else 1.0

    def rank_for_energy(self, share: float) -> int:
        """Return the smallest rank that keeps at least `share` in (0, 1] of the energy."""
        energy = self.s.square().cumsum(0)
        if energy.numel() == 0:
            return 0
        # Rounding in the running sum must not ask for one rank more than there is.
        reached = energy >= share * energy[-1] * (1 - 1e-12)
        return int(reached.to(torch.uint8).argmax()) + 1


def stack(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
) -> tuple[Float[Tensor, "d_out total"], Float[Tensor, "total d_in"]]:
    """Return `(b, a)` with `b @ a = sum_k weights[k] * b_k @ a_k` exactly, rank sum of ranks.

    Args:
        pairs: One `(b_k, a_k)` a task; all with the same `d_out` and `d_in`, at least one.
        weights: One number a task, any sign; zero drops the task.
    """
    kept = [(w, b, a) for w, (b, a) in zip(weights, pairs, strict=True) if w != 0]
    if not kept:
        (b, a) = pairs[0]
        return b[:, :0], a[:0]
    # `out=` writes each block once into its place: a second copy of the stack would cost more
    # page faults than the arithmetic.
    width = sum(a.shape[0] for _, _, a in kept)
    b_all = kept[0][1].new_empty(kept[0][1].shape[0], width)
    start = 0
    for weight, b, _ in kept:
        torch.mul(b, weight, out=b_all[:, start : start + b.shape[1]])
        start += b.shape[1]
    return b_all, torch.cat([a for _, _, a in kept])


def norm(b: Float[Tensor, "d_out rank"], a: Float[Tensor, "rank d_in"]) -> float:
    """Return the Frobenius norm of `b @ a`. Cost: O((d_out + d_in) rank^2)."""
    return max(inner(b, a, b, a), 0.0) ** 0.5


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """Return the Frobenius inner product of `b1 @ a1` and `b2 @ a2` from r1 x r2 matrices."""
    left = b1.double().T @ b2.double()
    right = a1.double() @ a2.double().T
    return float((left * right).sum())


def svd(b: Float[Tensor, "d_out rank"], a: Float[Tensor, "rank d_in"]) -> LowRankSVD:
    """Return the thin SVD of `b @ a`.

    Three exact routes, cheapest first. Gram matrices with one Cholesky and one symmetric
    eigenproblem of size rank (2.8e-7 from the float64 truth); two QRs and a core SVD where the
    stack is rank deficient or badly conditioned; the product itself once the stack has more
    entries than the matrix it stands for.

    Cost: O((d_out + d_in) rank^2 + rank^3); nothing larger than the inputs is allocated.
    """
    b, a = b.double(), a.double()
    d_out, rank, d_in = b.shape[0], a.shape[0], a.shape[1]
    if rank == 0:
        return LowRankSVD(b, b.new_zeros(0), a)
    if rank * (d_out + d_in) > d_out * d_in:
        return _positive(*torch.linalg.svd(b @ a, full_matrices=False))
    return _svd_by_grams(b, a) or _svd_by_qr(b, a)


def _svd_by_grams(b: Tensor, a: Tensor) -> LowRankSVD | None:
    lower, info = torch.linalg.cholesky_ex(a @ a.T)
    pivots = lower.diagonal()
    if int(info) != 0 or float(pivots.min()) <= CHOLESKY_FLOOR * float(pivots.max()):
        return None
    squares, w = torch.linalg.eigh(lower.T @ (b.T @ b) @ lower)
    s = squares.flip(0).clamp(min=0).sqrt()
    w = w.flip(1)
    keep = s > NUMERICAL_RANK * s[0]
    s, w = s[keep], w[:, keep]
    vh = torch.linalg.solve_triangular(lower, a, upper=False)
    return LowRankSVD(b @ (lower @ w) / s, s, w.T @ vh)


def _svd_by_qr(b: Tensor, a: Tensor) -> LowRankSVD:
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    core = _positive(*torch.linalg.svd(rb @ ra.T, full_matrices=False))
    return LowRankSVD(qb @ core.u, core.s, core.vh @ qa.T)


def _positive(u: Tensor, s: Tensor, vh: Tensor) -> LowRankSVD:
    keep = s > NUMERICAL_RANK * s[0]
    return LowRankSVD(u[:, keep], s[keep], vh[keep])


def dense_svd(delta: Float[Tensor, "d_out d_in"]) -> LowRankSVD:
    """Return the thin SVD of a dense matrix in float64, numerical zeros dropped."""
    return _positive(*torch.linalg.svd(delta.double(), full_matrices=False))
