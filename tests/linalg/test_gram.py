"""Gram matrices against their definition."""

import pytest
import torch

from icm_ray.linalg import gram as gram_module
from icm_ray.linalg import gram_sums
from icm_ray.linalg.gram import Gram, inner_products
from icm_ray.linalg.gram_sums import DirectionSum, WholeSum, kept_entries, sum_for


def test_inner_products_are_those_of_the_dense_products() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(6, r, generator=draw), torch.randn(r, 5, generator=draw)) for r in (2, 0, 9, 1)
    ]
    flat = torch.stack([(b @ a).flatten().double() for b, a in pairs])
    torch.testing.assert_close(inner_products(pairs), flat @ flat.T, rtol=1e-5, atol=1e-5)


def matrix(rows: int, d_in: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d_in, generator=draw, dtype=torch.float64) * torch.linspace(1, 3, d_in)


def upper(square: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[i:] for i, row in enumerate(square)])


def stored(d_in: int = 9) -> list[Gram]:
    """A Gram of each form that is stored."""
    whole, root = matrix(20, d_in).T @ matrix(20, d_in) / 20, matrix(3, d_in, 1)
    diagonal = matrix(1, d_in, 2)[0].square()
    parts = [
        {"gram": whole},
        {"gram": upper(whole)},
        {"gram_root": root, "gram_diagonal": diagonal},
        {"gram_diagonal": diagonal},
    ]
    return [Gram.of(d_in, **part) for part in parts]


def test_a_triangle_is_its_whole() -> None:
    whole, triangle, *_ = stored()
    torch.testing.assert_close(whole.square(), triangle.square())
    torch.testing.assert_close(whole.energies(), triangle.energies())


@pytest.mark.parametrize("gram", stored())
def test_any_form_acts_as_its_square(gram: Gram) -> None:
    square, x = gram.square(), matrix(4, 9, 3)
    for other in (gram, *stored()):
        torch.testing.assert_close((gram + other).square(), square + other.square())
    torch.testing.assert_close(gram.energies(), square.diagonal())
    torch.testing.assert_close(gram.left(x), x @ square)
    torch.testing.assert_close(gram.solved(x), x @ square.inverse())
    torch.testing.assert_close((gram + gram).solved(x), x @ square.inverse() / 2)
    damped = (
        square * 0.7
        + torch.diag(square.diagonal()) * 0.3
        + torch.eye(9, dtype=torch.float64) * (0.1 * square.diagonal().mean())
    )
    torch.testing.assert_close(gram.damped(0.7, 0.1).square(), damped)
    assert torch.equal(gram.square(), square), "nothing was changed"


@pytest.mark.parametrize("gram", stored())
def test_inner_products_of_any_two_forms(gram: Gram, monkeypatch) -> None:
    monkeypatch.setattr(gram_module, "RUN", 7)
    mixed = stored()[1] + stored()[2]
    for other in (*stored(), mixed):
        expected = float((gram.square() * other.square()).sum())
        assert gram.inner(other) == pytest.approx(expected, rel=1e-12)
        assert other.inner(gram) == pytest.approx(expected, rel=1e-12)
    assert mixed.inner(mixed) == pytest.approx(float(mixed.square().square().sum()), rel=1e-12)


def test_a_singular_one_has_no_solution() -> None:
    root, x = matrix(3, 9), matrix(1, 9)
    assert Gram.of(9, gram_root=root).solved(x) is None
    rounding = torch.full((9,), 1e-18, dtype=torch.float64)
    assert Gram.of(9, gram_root=root, gram_diagonal=rounding).solved(x) is None
    assert Gram.of(9, gram=root.T @ root * 0).solved(x) is None


@pytest.mark.parametrize("directions", [None, 20, 9, 4, 0])
def test_sums_are_means_of_products(directions, monkeypatch) -> None:
    """Exact where nothing is cut, in strips too; the diagonal is in any case."""
    monkeypatch.setattr(gram_sums, "STRIP", 4)
    x = matrix(50, 9).float()
    cpu = torch.device("cpu")
    total = WholeSum(9, cpu) if directions is None else DirectionSum(9, cpu, directions)
    for rows in x.split(7):
        total.add(rows)
    found, expected = total.mean(), x.double().T @ x.double() / 50
    torch.testing.assert_close(found.energies(), expected.diagonal(), rtol=1e-6, atol=1e-6)
    square = found.square()
    assert torch.linalg.eigvalsh(square).min() > 0
    if directions is None or directions >= 9:
        torch.testing.assert_close(square, expected, rtol=1e-6, atol=1e-6)
    else:
        assert set(found.tensors()) == {"gram_diagonal", *(["gram_root"] if directions else [])}
        bare = torch.diag(expected.diagonal())
        assert directions == 0 or (square - expected).norm() < 0.8 * (bare - expected).norm()


def test_what_a_form_would_save_decides_about_it() -> None:
    cpu = torch.device("cpu")
    for d_in, directions, kind in ((9, 3, DirectionSum), (9, 4, WholeSum), (9, None, WholeSum)):
        total = sum_for(d_in, cpu, directions)
        assert type(total) is kind
        total.add(matrix(40, d_in).float())
        numbers = sum(x.numel() for x in total.mean().tensors().values())
        assert numbers == kept_entries(d_in, directions)
