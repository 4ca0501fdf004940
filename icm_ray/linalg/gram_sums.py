"""Sums of `x x^T` over rows that come in batches: whole, or by their strongest directions."""

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg.gram import Gram

STRIP = 512
"""Rows of a sum that are added to at a time: half of a wide matrix is never computed."""


def kept_entries(d_in: int, directions: int | None) -> int:
    """Return how many numbers a Gram is stored in.

    Args:
        d_in: Its width.
        directions: Directions beside the diagonal; None: the whole, which is also what is kept
            where they would take as much.
    """
    whole = d_in * (d_in + 1) // 2
    return whole if directions is None else min((directions + 1) * d_in, whole)


class WholeSum:
    """Sum of float32 products in float64, the upper triangle alone, on the rows' own device."""

    def __init__(self, d_in: int, device: torch.device) -> None:
        self.d_in, self.count = d_in, 0
        like = {"dtype": torch.float64, "device": device}
        self.strips = [
            torch.zeros(min(STRIP, d_in - i), d_in - i, **like) for i in range(0, d_in, STRIP)
        ]

    def add(self, rows: Float[Tensor, "n d_in"]) -> None:
        """Add `rows^T rows`."""
        self.count += len(rows)
        for i, strip in zip(range(0, self.d_in, STRIP), self.strips, strict=True):
            strip += rows[:, i : i + STRIP].T @ rows[:, i:]

    def mean(self) -> Gram:
        """Return the mean over all rows, float32, in the processor's memory."""
        means = ((strip / self.count).float() for strip in self.strips)
        upper = torch.cat([row[i:] for mean in means for i, row in enumerate(mean)])
        return Gram.of(self.d_in, upper.cpu())


class DirectionSum:
    """The same by at most `directions` directions and the diagonal: `d_in^2` numbers never exist.

    Rows join the directions so far, and of both together the strongest are kept: an exact singular
    value decomposition of all rows as long as nothing is cut, close to it for spectra that fall
    (Levy and Lindenbaum, Sequential Karhunen-Loeve basis extraction, 2000, without forgetting).
    What is cut stays in the diagonal, so the sum is positive and its diagonal exact.

    Cost: O(directions * d_in) a row, and as many numbers.
    """

    def __init__(self, d_in: int, device: torch.device, directions: int) -> None:
        self.directions, self.count = directions, 0
        self.root = torch.zeros(0, d_in, dtype=torch.float64, device=device)
        self.energies = torch.zeros(d_in, dtype=torch.float64, device=device)

    def add(self, rows: Float[Tensor, "n d_in"]) -> None:
        """Add `rows^T rows`."""
        self.count += len(rows)
        self.energies += rows.square().sum(0, dtype=torch.float64)
        if self.directions:
            for part in rows.split(2 * self.directions):
                self.root = _strongest(torch.cat([self.root, part.double()]), self.directions)

    def mean(self) -> Gram:
        """Return the mean over all rows, float32, in the processor's memory."""
        rest = (self.energies - self.root.square().sum(0)).clamp(min=0)
        root = self.root / self.count**0.5
        return Gram(root.float().cpu(), (rest / self.count).float().cpu())


def _strongest(rows: Float[Tensor, "n d_in"], count: int) -> Float[Tensor, "m d_in"]:
    """Return at most `count` orthogonal rows, whose `rows^T rows` comes closest."""
    if len(rows) <= count:
        return rows
    _, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors[:, -count:].T @ rows


def sum_for(d_in: int, device: torch.device, directions: int | None) -> WholeSum | DirectionSum:
    """Return an empty sum that is stored as `kept_entries` counts."""
    if directions is None or kept_entries(d_in, None) <= (directions + 1) * d_in:
        return WholeSum(d_in, device)
    return DirectionSum(d_in, device, directions)
