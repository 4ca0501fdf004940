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


BLOCK_ENTRIES = 2**17
"""Float64 numbers converted at a time (1 MB): whole copies cost more page faults than the sums."""


@dataclass(frozen=True)
class LowRankSVD:
    """Thin SVD of a low-rank product: `u @ diag(s) @ vh`, numerical zeros dropped.

    `u = left @ left_core` and `vh = right_core @ right` stay products until somebody asks: a cut to
    a small rank needs few of their columns.

    Attributes:
        left: `(d_out, r)`.
        left_core: `(r, q)`, float64.
        s: `(q,)`, descending, positive, float64.
        right_core: `(q, r)`, float64.
        right: `(r, d_in)`.
    """

    left: Float[Tensor, "d_out r"]
    left_core: Float[Tensor, "r q"]
    s: Float[Tensor, " q"]
    right_core: Float[Tensor, "q r"]
    right: Float[Tensor, "r d_in"]

    @property
    def u(self) -> Float[Tensor, "d_out q"]:
        """Left singular vectors, orthonormal columns, float64."""
        return self.left.double() @ self.left_core

    @property
    def vh(self) -> Float[Tensor, "q d_in"]:
        """Right singular vectors, orthonormal rows, float64."""
        return self.right_core @ self.right.double()

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return float32 `(b, a)` of the best approximation of at most `rank`.

        The singular values are shared evenly (`b = u sqrt(s)`), so both factors have entries of
        similar size and survive half precision.
        """
        root = self.s[:rank].sqrt()
        b = product(self.left, self.left_core[:, :rank] * root)
        a = product(self.right.T, self.right_core[:rank].T * root)
        return b, a.T.contiguous()

    def retained_energy(self, rank: int) -> float:
        """Return the share of the squared Frobenius norm inside the first `rank` values."""
        energy = self.s.square()
        total = float(energy.sum())
        return float(energy[:rank].sum()) / total if total > 0 else 1.0


def rank_for_energy(s: Float[Tensor, " q"], share: float) -> int:
    """Return the smallest rank that keeps at least `share` in (0, 1] of the squared values' sum."""
    energy = s.square().cumsum(0)
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
    """Return the Frobenius norm of `b @ a`; not finite if an entry of either is not.

    Cost: O((d_out + d_in) rank^2), or O(d_out d_in rank) where that is less.
    """
    if _is_wide(b, a):
        return float(torch.linalg.vector_norm(_dense(b, a)))
    return max(float((gram(b, b) * gram(a.T, a.T)).sum()), 0.0) ** 0.5


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """Return the Frobenius inner product of `b1 @ a1` and `b2 @ a2` from r1 x r2 matrices."""
    return float((gram(b1, b2) * gram(a1.T, a2.T)).sum())


def svd(b: Float[Tensor, "d_out rank"], a: Float[Tensor, "rank d_in"]) -> LowRankSVD:
    """Return the thin SVD of `b @ a`.

    Three exact routes, cheapest first. Gram matrices with one Cholesky and one symmetric
    eigenproblem of size rank (2.8e-7 from the float64 truth); two QRs and a core SVD where the
    stack is rank deficient or badly conditioned; the product itself once the stack has more
    entries than the matrix it stands for.

    Cost: O((d_out + d_in) rank^2 + rank^3); nothing larger than the inputs is allocated.
    """
    if a.shape[0] == 0:
        empty = torch.zeros(0, 0, dtype=torch.float64)
        return LowRankSVD(b, empty, empty[0:0].flatten(), empty, a)
    if _is_wide(b, a):
        return dense_svd(_dense(b, a))
    return _svd_by_grams(b, a) or _svd_by_qr(b, a)


def root(products: Float[Tensor, "rank rank"]) -> Float[Tensor, "rank rank"]:
    """Return a root r of products of rows in some metric, `r @ r.T = products`, float64.

    `b @ r` has the left singular vectors and the values that `b @ a` has in the metric.
    """
    squares, vectors = torch.linalg.eigh(products)
    # Metrics come in float32: what is smaller is rounding, and would be a whole direction.
    squares = squares.where(squares > NUMERICAL_RANK * squares[-1:], 0)
    return vectors * squares.sqrt()


def _svd_by_grams(b: Tensor, a: Tensor) -> LowRankSVD | None:
    lower, info = torch.linalg.cholesky_ex(gram(a.T, a.T))
    pivots = lower.diagonal()
    if int(info) != 0 or float(pivots.min()) <= CHOLESKY_FLOOR * float(pivots.max()):
        return None
    squares, w = torch.linalg.eigh(lower.T @ gram(b, b) @ lower)
    s = squares.flip(0).clamp(min=0).sqrt()
    keep = s > NUMERICAL_RANK * s[0]
    s, w = s[keep], w.flip(1)[:, keep]
    solved = torch.linalg.solve_triangular(lower.T, w, upper=True)
    return LowRankSVD(b, (lower @ w) / s, s, solved.T, a)


def _svd_by_qr(b: Tensor, a: Tensor) -> LowRankSVD:
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = _positive(*torch.linalg.svd(rb @ ra.T, full_matrices=False))
    return LowRankSVD(qb, u, s, vh, qa.T)


def _positive(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keep = s > NUMERICAL_RANK * s[0]
    return u[:, keep], s[keep], vh[keep]


def _is_wide(b: Tensor, a: Tensor) -> bool:
    """Say whether the factors have more entries than their product."""
    d_out, rank, d_in = b.shape[0], a.shape[0], a.shape[1]
    return rank * (d_out + d_in) > d_out * d_in


def _rows(rank: int) -> int:
    return max(BLOCK_ENTRIES // max(rank, 1), 64)


def gram(x: Float[Tensor, "n r"], y: Float[Tensor, "n p"]) -> Float[Tensor, "r p"]:
    """Return `x.T @ y` in float64, converted block by block."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    step = _rows(max(total.shape))
    for start in range(0, x.shape[0], step):
        left = x[start : start + step].double()
        right = left if y is x else y[start : start + step].double()
        total.addmm_(left.T, right)
    return total


def product(x: Float[Tensor, "n r"], core: Float[Tensor, "r q"]) -> Float[Tensor, "n q"]:
    """Return `x @ core` as float32, computed in float64 block by block."""
    out = x.new_empty(x.shape[0], core.shape[1], dtype=torch.float32)
    step = _rows(x.shape[1])
    for start in range(0, x.shape[0], step):
        out[start : start + step] = x[start : start + step].double() @ core
    return out


def _dense(b: Tensor, a: Tensor) -> Float[Tensor, "d_out d_in"]:
    """Return `b @ a` in float64, converting few ranks at a time."""
    out = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64, device=b.device)
    step = _rows(max(out.shape))
    for start in range(0, a.shape[0], step):
        out.addmm_(b[:, start : start + step].double(), a[start : start + step].double())
    return out


def dense_svd(delta: Float[Tensor, "d_out d_in"]) -> LowRankSVD:
    """Return the thin SVD of a dense matrix in float64, numerical zeros dropped."""
    u, s, vh = _positive(*torch.linalg.svd(delta.double(), full_matrices=False))
    core = torch.eye(s.numel(), dtype=torch.float64, device=s.device)  # u and vh are the vectors
    return LowRankSVD(u, core, s, core, vh)
