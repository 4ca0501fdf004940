"""A high-pass filter on a matrix as if it were a picture; on low-rank products without the matrix.

The spectrum is that of `torch.fft.fft2`, unshifted: frequency `(0, 0)` is at the corner, so what is
far from the middle `(d_out // 2, d_in // 2)` is low. The real part of a filtered real matrix is the
same matrix filtered by the mean of the gain at a frequency and at its negative; every gain here is
that mean, and so real results come from real arithmetic.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

ROWS = 64
"""Rows of the spectrum weighted at a time; a whole matrix of gains is never needed."""


@dataclass(frozen=True)
class HighPass:
    """Keeps the frequencies within `ratio * min(shape)` of the middle of the spectrum.

    Attributes:
        shape: `(d_out, d_in)` of the matrices it is for.
        ratio: Radius over the shorter side; from sqrt(1/2) on nothing of a square is removed.
        ring_twice: Count frequencies at exactly `min(shape) // 10` twice, and keep all inside of
            it, as the reference's two overlapping masks do.
    """

    shape: tuple[int, int]
    ratio: float
    ring_twice: bool = False

    @property
    def ring(self) -> int:
        """Radius of the reference's inner mask."""
        return min(self.shape) // 10

    def _one_sided_gain(
        self, rows: Int[Tensor, " p"], columns: Int[Tensor, " q"]
    ) -> Float[Tensor, "p q"]:
        dy, dx = rows - self.shape[0] // 2, columns - self.shape[1] // 2
        # In float32, so that a radius such as 0.7 * 70 is the whole number it is meant to be.
        distance = (dy[:, None].square() + dx.square()).float().sqrt()
        radius = torch.tensor(self.ratio * min(self.shape), dtype=torch.float32)
        if not self.ring_twice:
            return (distance <= radius).float()
        band = (distance >= self.ring) & (distance <= radius)
        return (distance <= self.ring).float() + band.float()

    def gain(self, rows: Int[Tensor, " p"], columns: Int[Tensor, " q"]) -> Float[Tensor, "p q"]:
        """Return what the frequencies `(row, column)` are multiplied by."""
        mirrored = self._one_sided_gain(-rows % self.shape[0], -columns % self.shape[1])
        return (self._one_sided_gain(rows, columns) + mirrored) / 2

    def changed(self) -> tuple[Int[Tensor, " p"], Int[Tensor, " q"]]:
        """Return the rows and the columns of the spectrum that hold a gain other than one.

        Columns end at the middle: those above are the mirrors of those below.
        """
        start = torch.tensor([0])  # no place of an axis is farther from its middle
        edges = (
            self._one_sided_gain(torch.arange(self.shape[0]), start)[:, 0],
            self._one_sided_gain(start, torch.arange(self.shape[1]))[0],
        )
        rows, columns = (
            self._with_ring_and_mirrors((edge == 0).nonzero()[:, 0], len(edge)) for edge in edges
        )
        return rows, columns[columns <= self.shape[1] // 2]

    def _with_ring_and_mirrors(self, places: Int[Tensor, " n"], size: int) -> Int[Tensor, " p"]:
        if self.ring_twice:
            places = torch.cat([places, (self._ring_offsets() + size // 2) % size])
        return torch.cat([places, -places % size]).unique()

    def _ring_offsets(self) -> Int[Tensor, " offsets"]:
        """Return the distances along one axis of the grid points at exactly the ring's radius."""
        offsets = torch.arange(-self.ring, self.ring + 1)
        rest = self.ring**2 - offsets.square()
        return offsets[rest.double().sqrt().round().long().square() == rest]

    def apply(self, dense: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """Return a matrix filtered. Cost: O(n log n) for n entries; twice their memory."""
        spectrum = torch.fft.rfft2(dense)
        columns = torch.arange(spectrum.shape[1])
        for start in range(0, self.shape[0], ROWS):
            rows = torch.arange(start, min(start + ROWS, self.shape[0]))
            spectrum[start : start + ROWS] *= self.gain(rows, columns)
        return torch.fft.irfft2(spectrum, s=self.shape)

    def removed_rank(self) -> int:
        """Return the rank of what `removed` gives, which depends on nothing but the shape."""
        _, columns = self.changed()
        return 2 * len(columns) - int(self._own_mirror(columns).sum())

    def removed(
        self, b: Float[Tensor, "d_out r"], a: Float[Tensor, "r d_in"]
    ) -> tuple[Float[Tensor, "d_out p"], Float[Tensor, "p d_in"]]:
        """Return float32 factors of what the filter takes away from `b @ a`, exactly.

        One cosine and one sine for each column of the spectrum that is changed: a column and its
        mirror are conjugates, so two real waves hold both.

        Cost: O((d_out + d_in) p r) with p the number of waves.
        """
        rows, columns = self.changed()
        alone = self._own_mirror(columns)
        down, along = _waves(self.shape[0], rows), _waves(self.shape[1], columns)
        wave = torch.complex128
        spectrum = (down.mH @ b.to(wave)) @ (a.to(wave) @ along.conj())
        # A sum over frequencies divides by d_out d_in; half of d_in's root goes to either factor.
        loss = (1 - self.gain(rows, columns).double()) * torch.where(alone, 1.0, 2.0)
        left = down @ (spectrum * loss) / (self.shape[0] * self.shape[1] ** 0.5)
        along = along / self.shape[1] ** 0.5
        new_b = torch.cat([left.real, -left.imag[:, ~alone]], 1)
        return new_b.float(), torch.cat([along.real, along.imag[:, ~alone]], 1).T.float()

    def _own_mirror(self, columns: Int[Tensor, " q"]) -> Tensor:
        return columns == -columns % self.shape[1]


def _waves(size: int, frequencies: Int[Tensor, " p"]) -> Complex[Tensor, "size p"]:
    # Whole turns are taken off while the numbers are whole: angles stay exact for any size.
    turns = torch.outer(torch.arange(size), frequencies) % size
    angle = turns.double() * (2 * torch.pi / size)
    return torch.polar(torch.ones_like(angle), angle)
