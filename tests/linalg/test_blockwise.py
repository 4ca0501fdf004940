"""Cuts of matrices that come in row blocks, beside the dense SVD."""

from collections.abc import Iterator

import pytest
import torch

from icm_ray.linalg import blockwise
from icm_ray.linalg.blockwise import truncate


def in_blocks(matrix: torch.Tensor, rows: int):
    def blocks() -> Iterator[torch.Tensor]:
        buffer = torch.empty(rows, matrix.shape[1])  # used again, as streams do
        for start in range(0, matrix.shape[0], rows):
            part = matrix[start : start + rows]
            yield buffer[: part.shape[0]].copy_(part)

    return blocks


def cut(matrix: torch.Tensor, rank: int, rows: int = 3):
    shape = (matrix.shape[0], matrix.shape[1])
    return truncate(shape, in_blocks(matrix, rows), lambda _s: rank, rank)


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)])
@pytest.mark.parametrize("rank", [1, 2, 50])
def test_small_matrices_are_cut_exactly(shape, rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = cut(matrix, rank)
    expected = best(matrix, rank)
    assert found.is_exact
    assert found.full_rank == min(shape)
    torch.testing.assert_close((found.b @ found.a).double(), expected, rtol=1e-5, atol=1e-5)
    share = float(expected.norm() ** 2 / matrix.double().norm() ** 2)
    assert found.retained_energy == pytest.approx(share, abs=1e-6)
    norms = found.b.norm(dim=0), found.a.norm(dim=1)  # singular values are shared evenly
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)


def test_numerical_zeros_are_no_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(20, 3, generator=draw) @ torch.randn(3, 11, generator=draw)
    assert cut(low, 8).b.shape[1] == 3
    assert cut(low.T.contiguous(), 8).full_rank == 3
    nothing = cut(torch.zeros(4, 6), 2)
    assert nothing.b.shape == (4, 0)
    assert nothing.retained_energy == 1.0


@pytest.fixture
def flat_spectrum() -> torch.Tensor:
    """A sparse matrix of full rank with a small signal: what TIES leaves, and the hardest case."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(300, 260, generator=draw)
    noise *= torch.rand(300, 260, generator=draw) < 0.2
    return noise + torch.randn(300, 5, generator=draw) @ torch.randn(5, 260, generator=draw)


@pytest.mark.parametrize("is_held", [True, False])
def test_the_randomised_route_keeps_what_the_exact_one_keeps(
    monkeypatch, flat_spectrum, is_held: bool
) -> None:
    exact = cut(flat_spectrum, 8)
    monkeypatch.setattr(blockwise, "EXACT_SIDE", 16)
    monkeypatch.setattr(blockwise, "HELD_ENTRIES", 10**6 if is_held else 1)
    found = cut(flat_spectrum, 8, rows=64)
    assert exact.is_exact
    assert not found.is_exact
    assert found.b.shape == (300, 8)
    residual = float((found.b @ found.a - flat_spectrum).norm() / flat_spectrum.norm())
    assert residual**2 == pytest.approx(1 - found.retained_energy, abs=1e-5)
    assert found.retained_energy == pytest.approx(exact.retained_energy, abs=1e-4)
    again = cut(flat_spectrum, 8, rows=64)
    assert torch.equal(found.b, again.b)
    assert torch.equal(found.a, again.a)


def test_a_rank_that_depends_on_the_spectrum_is_found_exactly(monkeypatch, flat_spectrum) -> None:
    monkeypatch.setattr(blockwise, "EXACT_SIDE", 16)
    shape = (flat_spectrum.shape[0], flat_spectrum.shape[1])
    found = truncate(shape, in_blocks(flat_spectrum, 50), lambda s: int((s > 10).sum()), None)
    assert found.is_exact
    assert found.b.shape[1] == int((torch.linalg.svdvals(flat_spectrum) > 10).sum())
