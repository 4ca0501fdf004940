"""Row spaces and null-space ratios: toy values of the paper's sheet and what must not matter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg.subspace import RATIO_FLOOR, null_space_ratio, row_space


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("z", "ratio"), [((1, 0), 0.4472), ((1, 2), 0.6), ((1, -2), 1.0)])
def test_toy_values(z: tuple[int, int], ratio: float) -> None:
    basis = row_space(torch.tensor([[2.0, 1.0]]))
    found = null_space_ratio(torch.tensor([z], dtype=torch.float32), basis)
    assert found.item() == pytest.approx(ratio, abs=5e-5)


def test_a_basis_is_orthonormal_and_spans_the_rows() -> None:
    a = rand(3, 7)
    basis = row_space(a)
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(a @ basis @ basis.T, a)


def test_dependent_rows_do_not_count() -> None:
    a = rand(2, 7)
    assert row_space(torch.cat([a, a, a[:1] - 3 * a[1:]])).shape == (7, 2)
    assert row_space(rand(9, 4)).shape == (4, 4)
    assert row_space(torch.zeros(3, 4)).shape == (4, 0)
    assert row_space(torch.zeros(0, 4)).shape == (4, 0)


@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from([1e-6, 0.3, 1.0, 1e6]))
def test_mixing_rows_and_scaling_inputs_change_nothing(rank: int, seed: int, scale: float) -> None:
    a, z = rand(rank, 8, seed=seed), rand(5, 8, seed=seed + 1)
    mix = rand(rank, rank, seed=seed + 2) + 3 * torch.eye(rank)
    plain = null_space_ratio(z, row_space(a))
    for other in (
        null_space_ratio(z, row_space(mix @ a)),
        null_space_ratio(z, row_space(a * scale)),
    ):
        torch.testing.assert_close(other, plain, rtol=0, atol=2e-4)
    torch.testing.assert_close(null_space_ratio(z * scale, row_space(a)), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-3, 1e15])
def test_even_extreme_inputs_keep_their_ratio(scale: float) -> None:
    basis = row_space(torch.tensor([[2.0, 1.0]]))
    assert null_space_ratio(torch.tensor([[1.0, 2.0]]) * scale, basis).item() == pytest.approx(0.6)


def test_inside_is_the_floor_and_outside_is_one() -> None:
    a = rand(2, 6)
    basis = row_space(a)
    inside = null_space_ratio(rand(4, 2) @ a, basis)
    torch.testing.assert_close(inside, torch.full((4,), RATIO_FLOOR**0.5), rtol=1, atol=1e-3)
    outside = torch.linalg.svd(a)[2][2:]
    torch.testing.assert_close(null_space_ratio(outside, basis), torch.ones(4))


def test_unrelated_inputs_lose_rank_over_width() -> None:
    rank, width = 6, 24
    ratio = null_space_ratio(rand(20_000, width), row_space(rand(rank, width, seed=1)))
    assert (1 - ratio.square()).mean().item() == pytest.approx(rank / width, abs=3e-3)


def test_half_precision_inputs_are_measured_in_float32() -> None:
    basis = row_space(torch.tensor([[2.0, 1.0]]))
    ratio = null_space_ratio(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), basis)
    assert ratio.dtype == torch.float32
    assert ratio.item() == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["zero", "inside", "outside", "plain"])
def test_the_gradient_is_finite_everywhere(kind: str) -> None:
    a = torch.tensor([[2.0, 1.0]])
    points = {"zero": (0, 0), "inside": (2, 1), "outside": (1, -2), "plain": (1, 2)}
    z = torch.tensor([points[kind]], dtype=torch.float32, requires_grad=True)
    null_space_ratio(z, row_space(a)).sum().backward()
    assert torch.isfinite(z.grad).all()
    if kind == "plain":
        step = 1e-3
        moved = z.detach() + torch.tensor([[step, 0.0]])
        rise = null_space_ratio(moved, row_space(a)) - null_space_ratio(z.detach(), row_space(a))
        assert z.grad[0, 0].item() == pytest.approx(rise.item() / step, rel=0.01)
