"""Model Stock against its formula on dense deltas."""

import pytest
import torch
from factor_samples import assert_close, check, context, dense, draw_factors, for_any_stack

from icm_ray.methods.model_stock import model_stock
from icm_ray.types import LoRAFactors


def related(count: int, noise: float) -> list[LoRAFactors]:
    """Return adapters that share a delta and have noise of their own."""
    shared = draw_factors(12, 10, 2, seed=100)
    own = [draw_factors(12, 10, 3, seed=i) for i in range(count)]
    return [
        LoRAFactors(torch.cat([shared.a, noise * f.a]), torch.cat([shared.b, f.b], 1)) for f in own
    ]


@for_any_stack
def test_what_every_merge_promises(factors: list[LoRAFactors]) -> None:
    check(model_stock, factors)


@for_any_stack
def test_one_adapter_comes_back(factors: list[LoRAFactors]) -> None:
    assert_close(dense(model_stock(factors[:1], context=context(1))), factors[0].delta())


@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_average_is_drawn_back_by_the_mean_cosine(count: int, noise: float) -> None:
    factors = related(count, noise)
    flat = torch.stack([f.delta().double().flatten() for f in factors])
    flat /= flat.norm(dim=1, keepdim=True)
    cosine = (flat @ flat.T)[~torch.eye(count, dtype=torch.bool)].mean()
    t = count * cosine / (1 + (count - 1) * cosine)
    mean = torch.stack([f.delta() for f in factors]).mean(0)
    found = dense(model_stock(factors, context=context(count), scale=0.5))
    assert_close(found, 0.5 * float(t) * mean)


def test_copies_are_kept_and_opposites_go_to_the_base() -> None:
    one = draw_factors(6, 5, 2)
    assert_close(dense(model_stock([one] * 3, context=context(3))), one.delta())
    opposed = [one, LoRAFactors(one.a, -0.5 * one.b)]
    assert torch.equal(dense(model_stock(opposed, context=context(2))), torch.zeros(6, 5))


def test_absent_tasks_have_no_say_in_the_angle_but_count_in_the_average() -> None:
    factors = related(2, noise=0.5)
    two = dense(model_stock(factors, context=context("ab")))
    four = dense(model_stock(factors, context=context("ab", "abcd")))
    assert_close(four, two / 2)
    alone = dense(model_stock(factors[:1], context=context("a", "abcd")))
    assert_close(alone, factors[0].delta() / 4)
