"""TSV-Merge against dense SVDs, and what dependent or too many directions do."""

import pytest
import torch
from factor_samples import TOY, assert_close, check, context, dense, draw_factors, for_any_stack

from icm_ray.methods.tsv import tsv
from icm_ray.types import LoRAFactors


def polar(x: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-6 * s[0]] @ vh[s > 1e-6 * s[0]]


def truth(factors: list[LoRAFactors], ranks: list[int], weights: list[float]) -> torch.Tensor:
    parts = [torch.linalg.svd(f.b.double() @ f.a.double()) for f in factors]
    u = polar(torch.cat([u[:, :rank] for (u, _, _), rank in zip(parts, ranks, strict=True)], 1))
    v = polar(torch.cat([vh[:rank].T for (_, _, vh), rank in zip(parts, ranks, strict=True)], 1))
    s = [w * s[:rank] for (_, s, _), rank, w in zip(parts, ranks, weights, strict=True)]
    return (u * torch.cat(s) @ v.T).float()


@for_any_stack
def test_what_every_merge_promises(factors: list[LoRAFactors]) -> None:
    check(tsv, factors)


@for_any_stack
def test_one_adapter_comes_back_however_wide_or_deficient(factors: list[LoRAFactors]) -> None:
    assert_close(dense(tsv(factors[:1], context=context(1))), factors[0].delta())


def test_toy_value() -> None:
    expected = torch.tensor([[1.3066, 2.0063], [-2.0719, 2.2304]])
    torch.testing.assert_close(dense(tsv(TOY, context=context(2))), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [None, 1, 3])
def test_unequal_ranks_scale_and_weights(keep: int | None) -> None:
    factors = [draw_factors(20, 15, rank, seed=rank) for rank in (2, 5, 1)]
    ranks = [min(rank, keep or rank) for rank in (2, 5, 1)]
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    result = tsv(factors, context=context(3), scale=0.3, weights=weights, keep=keep)
    assert result.rank == sum(ranks)
    assert_close(dense(result), 0.3 * truth(factors, ranks, [1.0, -0.5, 2.0]))


def test_a_weight_of_zero_leaves_a_task_out() -> None:
    factors = [draw_factors(9, 8, 2, seed) for seed in range(3)]
    weights = {"a": 1.0, "b": 0.0, "c": 1.0}
    found = dense(tsv(factors, context=context(3), weights=weights))
    assert_close(found, dense(tsv([factors[0], factors[2]], context=context("ac"))))


def test_more_directions_than_the_layer_has_are_shared_out() -> None:
    factors = [draw_factors(7, 12, 4, seed) for seed in range(3)]
    result = tsv(factors, context=context(3))
    assert result.rank == 6
    assert_close(dense(result), truth(factors, [2, 2, 2], [1.0] * 3))
    factors = [draw_factors(2, 12, 4, seed) for seed in range(3)]
    assert_close(dense(tsv(factors, context=context(3))), truth(factors, [1, 1, 1], [1.0] * 3))


def test_copies_of_an_adapter_add_up_to_it() -> None:
    one = draw_factors(12, 10, 2)
    assert_close(dense(tsv([one] * 3, context=context(3))), one.delta())


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-4])
def test_adapters_that_are_almost_alike(distance: float) -> None:
    one, other = draw_factors(40, 30, 4), draw_factors(40, 30, 4, seed=1)
    near = LoRAFactors(one.a + distance * other.a, one.b + distance * other.b)
    found = dense(tsv([one, near], context=context(2)))
    assert_close(found, truth([one, near], [4, 4], [1.0, 1.0]))
