"""Gram matrices: of whole deltas, and of a module's inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg.lowrank import inner

GRAM_KINDS = ("gram", "gram_root", "gram_diagonal")
"""What the tensors of a stored Gram are called; docs/evidence.md describes them."""


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


DIAGONAL_FLOOR = 1e-10
"""Smallest entry of a diagonal, over the largest of the whole, that Woodbury's identity divides by;
below it Cholesky's factor says whether a solution is there."""

RUN = 1 << 20
"""Numbers of a triangle that are held in float64 at a time."""


@dataclass(frozen=True)
class Gram:
    """A module's mean `x x^T` over its inputs: `whole + root^T root + diag(diagonal)`.

    It is stored as a whole, or by its strongest directions and the diagonal of all others, so that
    no diagonal entry is lost. Sums of any of these are of the same form. Arithmetic is float64.

    Attributes:
        root: `(directions, d_in)`.
        diagonal: `(d_in,)`, not negative.
        whole: Symmetric, or its upper triangle row by row, `(d_in (d_in + 1) / 2,)`.
    """

    root: Float[Tensor, "directions d_in"]
    diagonal: Float[Tensor, " d_in"]
    whole: Tensor | None = None

    @classmethod
    def of(
        cls,
        d_in: int,
        gram: Tensor | None = None,
        gram_root: Tensor | None = None,
        gram_diagonal: Tensor | None = None,
    ) -> "Gram":
        """Return the Gram that at least one stored tensor stands for; see docs/evidence.md."""
        like = next(part for part in (gram, gram_root, gram_diagonal) if part is not None)
        root = like.new_zeros(0, d_in) if gram_root is None else gram_root
        diagonal = like.new_zeros(d_in) if gram_diagonal is None else gram_diagonal
        return cls(root, diagonal, gram)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored of it by kind."""
        if self.whole is not None:
            return {"gram": self.whole}
        root = {"gram_root": self.root} if len(self.root) else {}
        return {**root, "gram_diagonal": self.diagonal}

    def energies(self) -> Float[Tensor, " d_in"]:
        """Return the diagonal of the whole: the mean square of every feature."""
        energies = self.root.double().square().sum(0) + self.diagonal
        return energies if self.whole is None else energies + self._whole_diagonal().double()

    def square(self) -> Float[Tensor, "d_in d_in"]:
        """Return the matrix itself."""
        upper = self._upper().triu()
        return upper + upper.triu(1).T

    def _upper(self) -> Float[Tensor, "d_in d_in"]:
        """Return a new matrix whose upper triangle is this one's; below it is anything."""
        root = self.root.double()
        upper = root.T @ root
        upper.diagonal().add_(self.diagonal)
        return upper if self.whole is None else upper.add_(self._opened())

    def _whole_diagonal(self) -> Float[Tensor, " d_in"]:
        """Return the diagonal of `whole`."""
        assert self.whole is not None
        if self.whole.ndim == 2:
            return self.whole.diagonal()
        d_in = len(self.diagonal)
        lengths = torch.arange(d_in, 0, -1)
        return self.whole[lengths.cumsum(0) - lengths]  # where each row of the triangle starts

    def _opened(self) -> Float[Tensor, "d_in d_in"]:
        """Return a matrix whose upper triangle is that of `whole`; below it is anything."""
        assert self.whole is not None
        if self.whole.ndim == 2:
            return self.whole.double()
        d_in = len(self.diagonal)
        opened = self.whole.new_zeros(d_in, d_in, dtype=torch.float64)
        for i, row in enumerate(self.whole.split(list(range(d_in, 0, -1)))):
            opened[i, i:] = row
        return opened

    def damped(self, rho: float, ridge: float) -> "Gram":
        """Return it with off-diagonals times `rho`, and a share of the mean added to the diagonal.

        Args:
            rho: In [0, 1]; below 1 no direction is left empty that has a feature in it.
            ridge: Share of the mean diagonal entry that is added to every diagonal entry.
        """
        opened = replace(self, whole=None if self.whole is None else self._opened())
        energies = opened.energies()
        diagonal = rho * self.diagonal.double() + (1 - rho) * energies + ridge * energies.mean()
        whole = None if opened.whole is None else rho * opened.whole
        return Gram(rho**0.5 * self.root.double(), diagonal, whole)

    def inner(self, other: "Gram") -> float:
        """Return the sum of the products of this one's entries with another's.

        Cost: O(d_in^2) for two wholes, O(D^2 d_in) for D directions each; no matrix is formed.
        """
        root = other.root.double()
        total = float(self.energies() @ other.diagonal.double())
        if len(root):
            total += float((self.left(root) * root).sum())
        if other.whole is None:
            return total
        whole = Gram(other.root[:0], torch.zeros_like(other.diagonal), other.whole)
        if self.whole is None:
            return total + whole.inner(self)
        runs = zip(self._triangle().split(RUN), whole._triangle().split(RUN), strict=True)
        above = sum(float(mine.double() @ yours.double()) for mine, yours in runs)
        once = float(self._whole_diagonal().double() @ whole._whole_diagonal().double())
        return total + whole.inner(replace(self, whole=None)) + 2 * above - once

    def _triangle(self) -> Float[Tensor, " entries"]:
        """Return the upper triangle of `whole` row by row."""
        assert self.whole is not None
        if self.whole.ndim == 1:
            return self.whole
        return torch.cat([row[i:] for i, row in enumerate(self.whole)])

    def __add__(self, other: "Gram") -> "Gram":
        """Return the sum of two Grams of one module."""
        wholes = [gram._opened() for gram in (self, other) if gram.whole is not None]
        return Gram(
            torch.cat([self.root, other.root]),
            self.diagonal + other.diagonal,
            sum(wholes[1:], wholes[0]) if wholes else None,
        )

    def left(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Return `x @ G`."""
        x, root = x.double(), self.root.double()
        product = (x @ root.T) @ root + x * self.diagonal
        if self.whole is None:
            return product
        upper = self._opened().triu()
        return product + x @ upper + x @ upper.T - x * upper.diagonal()

    def solved(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"] | None:
        """Return `x @ G^-1`, or None if G is singular.

        Cost: O(d_in^3) for a whole; O(directions^2 d_in) otherwise, by Woodbury's identity.
        """
        if self.whole is None and len(self.root) < len(self.diagonal):
            least = DIAGONAL_FLOOR * self.energies().max()
            if bool((self.diagonal > least).all()):
                return self._by_directions(x.double())
        factor, failed = torch.linalg.cholesky_ex(self._upper(), upper=True)
        return None if failed else torch.cholesky_solve(x.double().T, factor, upper=True).T

    def _by_directions(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        # G = D (I + V^T V) D with D the root of the diagonal: no number is far from 1 in the core.
        scale = self.diagonal.double().rsqrt()
        v, x = self.root * scale, x * scale
        core = v @ v.T
        core.diagonal().add_(1)
        inner_part = torch.cholesky_solve(v @ x.T, torch.linalg.cholesky(core))
        return (x - inner_part.T @ v) * scale
