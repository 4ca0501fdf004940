"""Iso-C and Iso-CTS against dense SVDs; flat spectra and what is left out of them."""

import pytest
import torch
from factor_samples import TOY, assert_close, check, context, dense, draw_factors, for_any_stack

from icm_ray.methods.iso_c import iso_c
from icm_ray.methods.iso_cts import iso_cts
from icm_ray.types import LoRAFactors


def dense_iso_cts(
    factors: list[LoRAFactors], n: int, common_fraction: float
) -> tuple[torch.Tensor, int]:
    """Return the merge of tasks of full strength, and how many directions each task gives."""
    deltas = [f.b.double() @ f.a.double() for f in factors]
    u, s, vh = torch.linalg.svd(sum(deltas))
    each = round((n - int(n * common_fraction)) / len(deltas))
    common = n - each * len(deltas)
    us, values, vs = [u[:, :common]], [s[:common]], [vh[:common].T]
    for delta in deltas:
        left, own, right = torch.linalg.svd(delta - us[0] @ us[0].T @ delta)
        us.append(left[:, :each])
        values.append(own[:each])
        vs.append(right[:each].T)
    both = []
    for stack in (us, vs):
        left, _, right = torch.linalg.svd(torch.cat(stack, 1), full_matrices=False)
        both.append(left @ right)
    return (torch.cat(values).mean() * both[0] @ both[1].T).float(), each


@for_any_stack
def test_what_every_merge_promises_iso_c(factors: list[LoRAFactors]) -> None:
    check(iso_c, factors)


@for_any_stack
def test_what_every_merge_promises_iso_cts(factors: list[LoRAFactors]) -> None:
    check(iso_cts, factors)


@for_any_stack
def test_of_one_adapter_nothing_is_specific(factors: list[LoRAFactors]) -> None:
    told = context(1)
    assert_close(dense(iso_cts(factors[:1], context=told)), dense(iso_c(factors[:1], context=told)))


def test_toy_value() -> None:
    expected = torch.tensor([[1.5, 2], [-2, 1.5]])
    torch.testing.assert_close(dense(iso_c(TOY, context=context(2))), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
@pytest.mark.parametrize("scale", [0.7, -1.0])
def test_the_spectrum_is_flat_over_the_rank_there_is(merge, scale: float) -> None:
    factors = [draw_factors(20, 15, rank, seed=rank) for rank in (2, 4, 1)]
    factors.append(LoRAFactors(factors[0].a[[0, 0]], factors[0].b[:, [0, 0]]))
    found = dense(merge(factors, context=context(4), scale=scale))
    s = torch.linalg.svdvals(found)
    torch.testing.assert_close(s[:7], s[0].expand(7), rtol=1e-4, atol=0)
    assert s[7] < 1e-5 * s[0]
    if merge is iso_c:
        total = torch.linalg.svdvals(sum(f.delta() for f in factors)).sum()
        assert_close(s[0], abs(scale) * total / 7)
        assert float((found * sum(f.delta() for f in factors)).sum()) * scale > 0


@pytest.mark.parametrize("common_fraction", [0.8, 0.5, 0.3])
def test_iso_cts_is_the_dense_algorithm_on_the_rank_there_is(common_fraction: float) -> None:
    factors = [draw_factors(25, 20, rank, seed=rank) for rank in (3, 5, 4)]
    expected, each = dense_iso_cts(factors, 12, common_fraction)
    assert each > 0
    found = iso_cts(factors, context=context(3), common_fraction=common_fraction)
    assert found.rank == 12
    assert_close(dense(found), expected)


def test_more_ranks_than_the_layer_has() -> None:
    factors = [draw_factors(6, 9, 4, seed) for seed in range(3)]
    u, s, vh = torch.linalg.svd(sum(f.delta().double() for f in factors), full_matrices=False)
    found = iso_c(factors, context=context(3))
    assert_close(dense(found), (s.mean() * u @ vh).float())
    expected, _ = dense_iso_cts(factors, 6, 0.5)
    assert_close(dense(iso_cts(factors, context=context(3), common_fraction=0.5)), expected)


def test_all_common_is_iso_c_and_none_common_cannot_ask_for_too_much() -> None:
    factors = [draw_factors(12, 10, 1, seed) for seed in range(5)]
    told = context(5)
    all_common = dense(iso_cts(factors, context=told, common_fraction=1.0))
    assert_close(all_common, dense(iso_c(factors, context=told)))
    factors = [draw_factors(12, 5, 1, seed) for seed in range(3)]
    for count in (2, 3):  # round(5 / 3) * 3 would be 6
        wide = [factors[0], *[draw_factors(12, 5, 2, seed) for seed in range(1, count)]]
        found = dense(iso_cts(wide, context=context(count), common_fraction=0.0))
        assert torch.linalg.matrix_rank(found) == 2 * count - 1


def test_deltas_that_cancel_leave_no_common_direction() -> None:
    one, rest = draw_factors(12, 10, 2), draw_factors(12, 10, 1, seed=1)
    against = LoRAFactors(one.a, -one.b)
    told = context(2)
    assert dense(iso_cts([one, against], context=told)).norm() < 1e-5 * one.delta().norm()
    assert_close(
        dense(iso_c([one, rest, against], context=context(3))),
        rest.delta(),
    )


def test_tasks_inside_of_the_common_directions_give_none_of_their_own() -> None:
    one = draw_factors(30, 20, 5)
    copies = [one] * 2
    found = dense(iso_cts(copies, context=context(2), common_fraction=0.6))
    s = torch.linalg.svdvals(found)
    assert torch.linalg.matrix_rank(found) == 5 - 1  # both bring the same direction
    assert s.isfinite().all()
