"""The orthonormal basis of a stack of factors, from small matrices.

A stack `x` is factors side by side, `(n, total)`. The basis is that of `x @ core`, where `core`
says how the columns of the stack are weighed; nothing larger than the stack is made.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg import lowrank
from icm_ray.linalg.orthogonal import GRAM_FLOOR


@dataclass(frozen=True)
class Basis:
    """Left singular vectors `u = left @ left_core` of `x @ core`, numerical zeros dropped.

    Attributes:
        left: `(n, r)`: the stack itself, or orthonormal columns that span it.
        left_core: `(r, q)`, float64.
        s: `(q,)`, singular values, descending, positive, float64.
        coordinates: `u.T @ x`, `(q, total)`, float64: the stack seen from the basis.
    """

    left: Float[Tensor, "n r"]
    left_core: Float[Tensor, "r q"]
    s: Float[Tensor, " q"]
    coordinates: Float[Tensor, "q total"]

    def product(self, core: Float[Tensor, "q p"]) -> Float[Tensor, "n p"]:
        """Return `u @ core` as float32."""
        return lowrank.product(self.left, self.left_core @ core)


def basis_of(x: Float[Tensor, "n total"], core: Float[Tensor, "total p"] | None = None) -> Basis:
    """Return the left singular vectors of `x @ core`, and where `x` lies in them.

    One Gram matrix and one symmetric eigenproblem in float64; QR and an SVD where the stack is
    wider than tall, or where the smallest value that counts is too small for a Gram matrix.
    Values at or below `lowrank.NUMERICAL_RANK` of the largest do not count.

    Args:
        x: Factors side by side; any number of columns, none included.
        core: Float64; None for the stack as it is.

    Cost: O(n total^2 + total^3).
    """
    weighed = torch.eye(x.shape[1], dtype=torch.float64) if core is None else core
    if x.shape[0] < x.shape[1]:
        return _by_qr(x, weighed)
    gram = lowrank.gram(x, x)
    squares, w = torch.linalg.eigh(weighed.T @ gram @ weighed)
    s = squares.flip(0).clamp(min=0).sqrt()
    keep = s > lowrank.NUMERICAL_RANK * s[:1]
    s, w = s[keep], w.flip(1)[:, keep]
    # The squared length of all columns measures rounding even where large columns cancel.
    length = float(gram.diagonal() @ weighed.square().sum(1))
    if s.numel() and float(s[-1]) ** 2 <= GRAM_FLOOR * length:
        return _by_qr(x, weighed)
    left_core = (weighed @ w) / s
    return Basis(x, left_core, s, left_core.T @ gram)


def _by_qr(x: Tensor, core: Tensor) -> Basis:
    q, r = torch.linalg.qr(x.double())
    u, s, _ = torch.linalg.svd(r @ core, full_matrices=False)
    keep = s > lowrank.NUMERICAL_RANK * s[:1]
    return Basis(q, u[:, keep], s[keep], u[:, keep].T @ r)


def row_root(a: Float[Tensor, "rank d_in"]) -> Float[Tensor, "rank p"]:
    """Return a float64 `root` with `root @ root.T = a @ a.T`: lengths and angles of the rows.

    Cholesky of the Gram matrix, or QR where rows are nearly dependent.
    """
    lower, info = torch.linalg.cholesky_ex(lowrank.gram(a.T, a.T))
    pivots = lower.diagonal()
    if int(info) == 0 and bool((pivots > lowrank.CHOLESKY_FLOOR * pivots.norm()).all()):
        return lower
    return torch.linalg.qr(a.double().T, mode="r").R.T
