"""Low-rank algebra against dense float64: every route of the SVD, norms, inner products, stacks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg import lowrank
from icm_ray.linalg.lowrank import (
    LowRankSVD,
    dense_svd,
    inner,
    norm,
    rank_for_energy,
    stack,
    svd,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ill_conditioned(rows: int, columns: int, decades: float, seed: int) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(rand(rows, columns, seed=seed).double(), full_matrices=False)
    s = torch.logspace(0, -decades, u.shape[1], dtype=torch.float64)
    return (u * s @ vh).float()


def cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    b, a = rand(12, 3), rand(3, 9, seed=1)
    twice = torch.cat([a, a])
    return {
        "random": (b, a),
        "rank one": (b[:, :1], a[:1]),
        "one by one": (rand(1, 1), rand(1, 1, seed=1)),
        "repeated rows of a": (rand(12, 6), twice),
        "repeated columns of b": (torch.cat([b, b], 1), rand(6, 9, seed=2)),
        "zero row of a": (b, a * torch.tensor([1.0, 0.0, 1.0])[:, None]),
        "zero a": (b, torch.zeros_like(a)),
        "zero b": (torch.zeros_like(b), a),
        "rank 0": (b[:, :0], a[:0]),
        "rank over the layer": (rand(4, 10), rand(10, 5, seed=1)),
        "rank just below the layer": (rand(8, 7), rand(7, 8, seed=1)),
        "badly conditioned a": (rand(30, 6), ill_conditioned(6, 25, 4, 1)),
        "hopelessly conditioned a": (rand(30, 6), ill_conditioned(6, 25, 9, 1)),
        "badly conditioned b": (ill_conditioned(30, 6, 5, 3), rand(6, 25, seed=1)),
        "tiny": (b * 1e-12, a * 1e-12),
        "huge": (b * 1e12, a * 1e12),
        "opposite scales": (b * 1e8, a * 1e-8),
    }


ROUTES = {
    "chosen": svd,
    "grams": lambda b, a: lowrank._svd_by_grams(b.double(), a.double()),
    "qr": lambda b, a: lowrank._svd_by_qr(b.double(), a.double()),
    "dense": lambda b, a: dense_svd(b.double() @ a.double()),
}


def check(found: LowRankSVD, b: torch.Tensor, a: torch.Tensor) -> None:
    exact = b.double() @ a.double()
    scale = float(torch.linalg.matrix_norm(exact)) or 1.0
    s = torch.linalg.svdvals(exact)
    rank = int((s > lowrank.NUMERICAL_RANK * s.max()).sum())
    assert found.s.numel() == rank
    assert found.u.shape == (b.shape[0], rank)
    assert found.vh.shape == (rank, a.shape[1])
    torch.testing.assert_close(found.s / scale, s[:rank] / scale, rtol=0, atol=1e-9)
    rebuilt = (found.u * found.s) @ found.vh
    # What counts as numerically zero may be missing, and nothing more.
    allowed = rank**0.5 * 1e-9 + lowrank.NUMERICAL_RANK * max(b.shape[1] - rank, 0)
    assert float(torch.linalg.matrix_norm(rebuilt - exact)) / scale <= allowed + 1e-9
    for basis in (found.u.T, found.vh):
        torch.testing.assert_close(
            basis @ basis.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_agrees_with_the_dense_svd(route: str, name: str) -> None:
    b, a = cases()[name]
    if route in ("grams", "qr") and not 0 < b.shape[1] <= min(b.shape[0], a.shape[1]):
        return  # svd() never asks these two for such a rank
    found = ROUTES[route](b, a)
    if found is None:
        assert route == "grams"
        assert name in (
            "repeated rows of a",
            "zero row of a",
            "zero a",
            "hopelessly conditioned a",
        )
        return
    check(found, b, a)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 15),
    st.integers(0, 5),
    st.integers(0, 99),
)
def test_any_shape_and_rank(d_out: int, d_in: int, rank: int, true_rank: int, seed: int) -> None:
    inside = rand(min(true_rank, rank), d_in, seed=seed)
    a = rand(rank, inside.shape[0], seed=seed + 1) @ inside  # rank deficient on purpose
    b = rand(d_out, rank, seed=seed + 2)
    found = svd(b, a)
    exact = b.double() @ a.double()
    scale = float(torch.linalg.matrix_norm(exact)) or 1.0
    error = float(torch.linalg.matrix_norm((found.u * found.s) @ found.vh - exact))
    assert error <= 1e-5 * scale
    assert found.s.numel() <= min(d_out, d_in, rank)


def test_inputs_are_left_alone_and_results_repeat() -> None:
    b, a = cases()["random"]
    before = b.clone(), a.clone()
    one, two = svd(b, a), svd(b, a)
    assert torch.equal(one.u, two.u)
    assert torch.equal(b, before[0])
    assert torch.equal(a, before[1])


def test_factors_are_the_best_approximation_and_share_the_scale() -> None:
    b, a = cases()["random"]
    found = svd(b, a)
    u, s, vh = torch.linalg.svd((b @ a).double(), full_matrices=False)
    for rank in (0, 1, 2, 3, 9):
        small_b, small_a = found.factors(rank)
        assert small_b.dtype == small_a.dtype == torch.float32
        assert small_b.shape[1] == min(rank, 3)
        assert small_b.is_contiguous()
        best = (u[:, : min(rank, 3)] * s[: min(rank, 3)]) @ vh[: min(rank, 3)]
        torch.testing.assert_close(small_b @ small_a, best.float(), rtol=1e-5, atol=1e-5)
        if rank:
            torch.testing.assert_close(small_b.norm(), small_a.norm())


def test_energy_counts_squares() -> None:
    found = dense_svd(torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0])))  # squares 16 4 4 1 of 25
    assert [found.retained_energy(r) for r in range(6)] == [0, 0.64, 0.8, 0.96, 1, 1]
    shares = {0.01: 1, 0.64: 1, 0.65: 2, 0.8: 2, 0.96: 3, 0.97: 4, 1.0: 4}
    assert {share: rank_for_energy(found.s, share) for share in shares} == shares


def test_nothing_has_all_its_energy() -> None:
    found = svd(torch.zeros(3, 2), torch.zeros(2, 4))
    assert found.retained_energy(0) == 1.0
    assert rank_for_energy(found.s, 0.5) == 0


def test_norm_and_inner_equal_the_dense_ones() -> None:
    b1, a1, b2, a2 = rand(7, 3), rand(3, 5, seed=1), rand(7, 4, seed=2), rand(4, 5, seed=3)
    dense = (b1.double() @ a1.double()) * (b2.double() @ a2.double())
    assert inner(b1, a1, b2, a2) == pytest.approx(float(dense.sum()), rel=1e-12)
    assert norm(b1, a1) == pytest.approx(float((b1.double() @ a1.double()).norm()), rel=1e-12)
    assert norm(b1[:, :0], a1[:0]) == 0.0
    assert norm(torch.cat([b1, b1], 1), torch.cat([a1, -a1])) == pytest.approx(0, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-1.5, 0.0, 1.0, 2.0])), min_size=1))
def test_a_stack_is_the_weighted_sum(parts: list[tuple[int, float]]) -> None:
    pairs = [(rand(5, r, seed=i), rand(r, 4, seed=-i)) for i, (r, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    b, a = stack(pairs, weights)
    assert b.shape[1] == sum(r for r, weight in parts if weight)
    expected = sum(
        (w * bk.double() @ ak.double() for w, (bk, ak) in zip(weights, pairs, strict=True)),
        torch.zeros(5, 4, dtype=torch.float64),
    )
    torch.testing.assert_close((b.double() @ a.double()), expected, rtol=1e-5, atol=1e-5)


def test_a_stack_needs_a_weight_for_each_pair() -> None:
    with pytest.raises(ValueError, match="argument 2 is"):
        stack([(rand(2, 1), rand(1, 2))], [1.0, 2.0])
