"""WUDI's closed form against its normal equations, and between its two ends."""

import pytest
import torch
from factor_samples import assert_close, check, context, dense, draw_factors, for_any_stack

from icm_ray.methods.wudi import wudi
from icm_ray.types import LoRAFactors


@for_any_stack
def test_what_every_merge_promises(factors: list[LoRAFactors]) -> None:
    check(wudi, factors)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_it_is_the_solution_of_the_regression_on_whole_matrices(ridge: float) -> None:
    factors = [draw_factors(9, 8, rank, seed=rank) for rank in (2, 5, 1)]
    left, right = torch.zeros(9, 8).double(), torch.zeros(8, 8).double()
    for delta in (f.delta().double() for f in factors):
        gram = delta.T @ delta / delta.square().sum() + ridge / 8 * torch.eye(8)
        left += delta @ gram
        right += gram
    expected = (left @ right.inverse()).float()
    assert_close(dense(wudi(factors, context=context(3), ridge=ridge)), expected)


def test_it_lies_between_the_average_and_all_deltas_at_once() -> None:
    factors = [draw_factors(9, 12, 2, seed=seed) for seed in range(3)]
    mean = sum(f.delta() for f in factors) / 3
    assert_close(dense(wudi(factors, context=context(3), ridge=1e6)), mean)
    found = dense(wudi(factors, context=context(3), ridge=1e-9))
    for f in factors:  # on the rows of each, the merge does what the adapter alone does
        assert_close(found @ f.a.T, f.delta() @ f.a.T)
