"""The filter beside a complex transform of the whole matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg.fourier import HighPass


def truth(dense: torch.Tensor, ratio: float, ring_twice: bool) -> torch.Tensor:
    """Two masks around the middle of the unshifted spectrum, and the real part of the inverse."""
    height, width = dense.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = ((y - height // 2) ** 2 + (x - width // 2) ** 2).float().sqrt()
    radius = torch.tensor(ratio * min(height, width)).float()
    gain = (distance <= radius).double()
    if ring_twice:
        ring = min(height, width) // 10
        gain = (distance <= ring).double() + ((distance >= ring) & (distance <= radius)).double()
    return torch.fft.ifft2(torch.fft.fft2(dense.double()) * gain).real


def drawn(height: int, width: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(height * width)
    return torch.randn(height, rank, generator=draw), torch.randn(rank, width, generator=draw)


@given(
    st.integers(1, 41),
    st.integers(1, 41),
    st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 4.0]),
    st.booleans(),
)
def test_a_matrix_and_its_factors_are_filtered_like_the_whole_spectrum(
    height: int, width: int, ratio: float, ring_twice: bool
) -> None:
    b, a = drawn(height, width, 2)
    expected = truth(b @ a, ratio, ring_twice).float()
    high_pass = HighPass((height, width), ratio, ring_twice)
    torch.testing.assert_close(high_pass.apply(b @ a), expected, rtol=1e-4, atol=1e-5)
    lost_b, lost_a = high_pass.removed(b, a)
    assert lost_b.shape[1] == len(lost_a) == high_pass.removed_rank()
    torch.testing.assert_close(b @ a - lost_b @ lost_a, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "ratio"), [(64, 0.7), (70, 0.7), (101, 0.68), (100, 0.7071)])
def test_squares_lose_little(size: int, ratio: float) -> None:
    assert HighPass((size, size), ratio).removed_rank() < size / 10


def test_nothing_is_removed_beyond_the_corner() -> None:
    high_pass = HighPass((50, 50), 0.7072)
    assert high_pass.removed_rank() == 0
    b, a = drawn(50, 50, 3)
    torch.testing.assert_close(high_pass.apply(b @ a), b @ a)


def test_a_radius_that_is_a_whole_number_includes_it() -> None:
    # 0.7 * 70 is 48.99999999999999 in float64.
    assert HighPass((70, 200), 0.7).gain(torch.tensor([35]), torch.tensor([51])) == 1
