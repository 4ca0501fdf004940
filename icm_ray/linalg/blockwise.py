"""SVD of a matrix that comes in row blocks: what is too large, or too costly, to decompose whole.

Shapes: the matrix is `(d_out, d_in)`; `blocks()` starts a pass over consecutive blocks of its rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg.lowrank import NUMERICAL_RANK

Blocks = Callable[[], Iterator[Tensor]]

HELD_ENTRIES = 2**26
"""A matrix of at most so many float32 entries (268 MB) is held for the passes over it."""
EXACT_SIDE = 512
"""Up to this shorter side the exact route costs no more than the randomised one."""
OVERSAMPLING, TURNS = 16, 6
"""Of the randomised route: within 1e-5 of the best residual on flat spectra, the hardest case."""
CHUNK = 256
CACHED = 64
"""Rows of a transposed product: a processor's second cache holds them, which halves its time."""


@dataclass(frozen=True)
class Truncation:
    """The best approximation of some rank, or nearly.

    Attributes:
        b: `(d_out, rank)`, float32.
        a: `(rank, d_in)`, float32; singular values are shared evenly by both.
        full_rank: Numerical rank of the matrix; the shorter side if the randomised route ran,
            which sees only the largest values.
        retained_energy: Share of the squared Frobenius norm that is kept, measured, in [0, 1].
        is_exact: False if the randomised route ran.
    """

    b: Float[Tensor, "d_out rank"]
    a: Float[Tensor, "rank d_in"]
    full_rank: int
    retained_energy: float
    is_exact: bool


def truncate(
    shape: tuple[int, int], blocks: Blocks, choose: Callable[[Tensor], int], limit: int | None
) -> Truncation:
    """Cut a matrix given by row blocks to a small rank.

    Exact for a shorter side of at most `EXACT_SIDE`, or where `choose` must see the whole spectrum:
    one symmetric eigenproblem of that side in float64. Else a randomised block Krylov method
    (arXiv 1504.05477, algorithm 2) whose passes touch a block at a time; the energy it keeps is
    measured, not estimated.

    Args:
        shape: `(d_out, d_in)`.
        blocks: Starts a pass over the rows.
        choose: Gives the rank to keep from the singular values, descending, float64.
        limit: Largest rank `choose` can give whatever the spectrum; None if it depends on it.
    """
    width = min(shape) if limit is None else min(limit + OVERSAMPLING, *shape)
    if min(shape) <= EXACT_SIDE or width * 8 > min(shape):
        return _exact(_held(shape, blocks), choose)
    if shape[0] * shape[1] <= HELD_ENTRIES:
        held = _held(shape, blocks)
        return _randomised(shape, lambda: iter((held,)), choose, width)
    return _randomised(shape, blocks, choose, width)


def _held(shape: tuple[int, int], blocks: Blocks) -> Float[Tensor, "d_out d_in"]:
    held, row = torch.empty(shape), 0
    for block in blocks():
        held[row : row + block.shape[0]] = block
        row += block.shape[0]
    return held


def _exact(matrix: Float[Tensor, "d_out d_in"], choose: Callable[[Tensor], int]) -> Truncation:
    if matrix.shape[0] < matrix.shape[1]:
        turned = _exact(matrix.T, choose)
        flipped = (turned.a.T.contiguous(), turned.b.T.contiguous())
        return Truncation(*flipped, turned.full_rank, turned.retained_energy, True)
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for start in range(0, matrix.shape[0], CHUNK):
        part = matrix[start : start + CHUNK].double()
        gram.addmm_(part.T, part)
    squares, v = torch.linalg.eigh(gram)
    s = squares.flip(0).clamp(min=0).sqrt()
    kept = s > NUMERICAL_RANK * s[:1]
    s, v = s[kept], v.flip(1)[:, kept]
    rank = min(choose(s), s.numel())
    root, v = s[:rank].sqrt(), v[:, :rank]
    b = torch.empty(matrix.shape[0], rank)
    for start in range(0, matrix.shape[0], CHUNK):
        b[start : start + CHUNK] = matrix[start : start + CHUNK].double() @ (v / root)
    a = (v * root).T.float().contiguous()
    return Truncation(b, a, s.numel(), _share(s, rank, float(squares.clamp(min=0).sum())), True)


def _randomised(
    shape: tuple[int, int], blocks: Blocks, choose: Callable[[Tensor], int], width: int
) -> Truncation:
    draw = torch.Generator().manual_seed(shape[0] * 1_000_003 + shape[1])
    z = torch.linalg.qr(torch.randn(shape[1], width, generator=draw, device="cpu")).Q
    total, spans, images = 0.0, [], []
    for turn in range(TURNS):
        y, ahead, row = torch.empty(shape[0], width), torch.zeros(shape[1], width), 0
        for part in (part for block in blocks() for part in block.split(CACHED)):
            seen = torch.mm(part, z, out=y[row : row + part.shape[0]])
            row += part.shape[0]
            if turn == 0:
                total += sum_of_squares(part)
            if turn < TURNS - 1:
                ahead.addmm_(part.T, seen)
        spans.append(z)
        images.append(y)
        if turn < TURNS - 1:
            # Householder's columns are orthonormal whatever the rank, so no image is lost.
            z = torch.linalg.qr(torch.cat([*spans, ahead], 1)).Q[:, -width:]
    # All powers together hold far more than the last one, and their images are known already.
    inside, image = torch.cat(spans, 1).double(), torch.cat(images, 1).double()
    squares, u = torch.linalg.eigh(image.T @ image)
    s = squares.flip(0).clamp(min=0).sqrt()
    s = s[s > NUMERICAL_RANK * s[:1]]
    rank = min(choose(s), s.numel())
    root, u = s[:rank].sqrt(), u.flip(1)[:, :rank]
    b = (image @ (u / root)).float()
    a = ((inside @ (u * root)).T).float().contiguous()
    return Truncation(b, a, min(shape), _share(s, rank, total), False)


def turned(d_in: int, blocks: Blocks, y: Float[Tensor, "d_out w"]) -> Float[Tensor, "d_in w"]:
    """Return the transposed matrix times `y`."""
    z, row = torch.zeros(d_in, y.shape[1]), 0
    for block in blocks():
        for part in block.split(CACHED):
            z.addmm_(part.T, y[row : row + part.shape[0]])
            row += part.shape[0]
    return z


def sum_of_squares(block: Tensor) -> float:
    """Return the sum of squares, in float64 over rows, each of which float32 sums well."""
    return float(torch.linalg.vector_norm(block, dim=1).double().square().sum())


def _share(s: Float[Tensor, " q"], rank: int, total: float) -> float:
    return min(float(s[:rank].square().sum()) / total, 1.0) if total > 0 else 1.0
