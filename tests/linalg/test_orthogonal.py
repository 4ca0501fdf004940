"""The nearest orthonormal vectors, beside an SVD in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg.orthogonal import polar


def truth(x: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    keep = s > 1e-6 * s[0]
    return u[:, keep] @ vh[keep]


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 50))
def test_it_is_the_polar_factor_of_any_shape(rows: int, columns: int, seed: int) -> None:
    x = drawn(rows, columns, seed)
    torch.testing.assert_close(polar(x), truth(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_dependent_columns_keep_float32_accuracy(distance: float) -> None:
    x = drawn(40, 5)
    x = torch.cat([x, x + distance * drawn(40, 5, seed=1)], 1)
    found = polar(x)
    torch.testing.assert_close(found, truth(x), rtol=0, atol=1e-8)
    torch.testing.assert_close(found.T @ found, torch.eye(10).double(), rtol=0, atol=1e-8)


def test_columns_that_are_the_same_share_their_direction() -> None:
    x = drawn(9, 3)
    thrice = polar(torch.cat([x, x, x], 1))
    torch.testing.assert_close(thrice, polar(x).repeat(1, 3) / 3**0.5)


def test_rounding_does_not_become_a_direction() -> None:
    x = drawn(9, 3)
    noisy = torch.cat([x, x + 1e-9 * drawn(9, 3, seed=1)], 1)
    torch.testing.assert_close(polar(noisy), polar(torch.cat([x, x], 1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 0), (0, 0), (4, 3)])
def test_nothing_stays_nothing(shape: tuple[int, int]) -> None:
    assert torch.equal(polar(torch.zeros(shape)), torch.zeros(shape).double())
