"""The basis of a stack beside dense SVDs in float64."""

import pytest
import torch
from torch import Tensor

from icm_ray.linalg.shared_basis import basis_of, row_root


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearly_dependent() -> Tensor:
    x = draw(40, 3)
    return torch.cat([x, x[:, :1] + 1e-4 * draw(40, 1, seed=1)], 1)


STACKS = {
    "tall": draw(40, 6),
    "wide": draw(5, 9),
    "square": draw(6, 6),
    "one row": draw(1, 4),
    "repeated columns": draw(40, 3)[:, [0, 1, 1, 2]],
    "nearly dependent": nearly_dependent(),
    "unequal lengths": draw(40, 5) * torch.tensor([1e4, 1.0, 1e-1, 1.0, 1e3]),
    "transposed": draw(6, 40).T,
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("weighed", [False, True])
def test_bases_are_those_of_the_dense_svd(name: str, weighed: bool) -> None:
    x = STACKS[name]
    core = draw(x.shape[1], 3, seed=2).double() if weighed else None
    dense = x.double() if core is None else x.double() @ core
    u, s, _ = torch.linalg.svd(dense, full_matrices=False)
    u, s = u[:, s > 1e-6 * s[0]], s[s > 1e-6 * s[0]]
    basis = basis_of(x, core)
    vectors = basis.product(torch.eye(s.numel(), dtype=torch.float64))
    torch.testing.assert_close(basis.s, s, rtol=1e-7, atol=1e-7 * float(s[0]))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(s.numel()), rtol=0, atol=2e-6)
    # The same spaces: one basis seen from the other is a diagonal of signs.
    seen = (u.float().T @ vectors).abs()
    torch.testing.assert_close(seen, torch.eye(s.numel()), rtol=0, atol=1e-4)
    own = vectors.double().T @ x.double()
    torch.testing.assert_close(basis.coordinates, own, rtol=0, atol=3e-6 * float(x.abs().max()))


def test_large_columns_that_cancel_leave_the_small_difference() -> None:
    b = draw(30, 2)
    other = b.clone()
    other[0] *= 1 + 2.0**-12
    x, core = torch.cat([b, other], 1), torch.cat([torch.eye(2), -torch.eye(2)]).double()
    exact = torch.linalg.svdvals(b.double() - other.double())
    torch.testing.assert_close(basis_of(x, core).s, exact[:1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(5, 0)])
def test_nothing_has_no_basis(x: Tensor) -> None:
    basis = basis_of(x)
    assert basis.s.shape == (0,)
    assert basis.coordinates.shape == (0, x.shape[1])
    assert basis.product(torch.zeros(0, 2, dtype=torch.float64)).equal(torch.zeros(x.shape[0], 2))


def test_scaling_by_a_power_of_two_changes_no_bit_of_the_vectors() -> None:
    x = draw(40, 6)
    one, two = basis_of(x), basis_of(x * 8)
    eye = torch.eye(6, dtype=torch.float64)
    assert torch.equal(one.product(eye), two.product(eye))
    assert torch.equal(one.s * 8, two.s)


@pytest.mark.parametrize(
    "rows", [draw(3, 20), draw(6, 4), draw(3, 20)[[0, 1, 1]], torch.zeros(2, 5)]
)
def test_row_roots_have_the_lengths_and_angles_of_the_rows(rows: Tensor) -> None:
    root = row_root(rows)
    gram = rows.double() @ rows.double().T
    torch.testing.assert_close(root @ root.T, gram, rtol=1e-12, atol=1e-12)


def test_no_rows_have_a_root() -> None:
    assert row_root(torch.zeros(0, 4)).shape[0] == 0
