"""Compress, then merge: what bases of full rank give back, and whom small ones serve."""

from functools import partial

import pytest
import torch
from factor_samples import assert_close, check, context, dense, draw_factors, for_any_stack

from icm_ray.methods.compress_then_merge import compress_then_merge
from icm_ray.types import LoRAFactors


@for_any_stack
def test_what_every_merge_promises(factors: list[LoRAFactors]) -> None:
    check(partial(compress_then_merge, inner="task_arithmetic"), factors)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_result_has_the_rank_that_is_asked_for(rank: int) -> None:
    factors = [draw_factors(9, 12, own, seed=own) for own in (2, 5, 3)]
    assert compress_then_merge(factors, context=context(3), rank=rank).rank == rank
    assert compress_then_merge(factors, context=context(3)).rank == 5


def test_bases_of_all_ranks_lose_nothing() -> None:
    factors = [draw_factors(9, 12, own, seed=own) for own in (2, 4, 3)]
    told = {"inner": "task_arithmetic", "scale": 0.5, "weights": {"a": 1.0, "b": -2.0, "c": 0.5}}
    found = compress_then_merge(factors, context=context(3), rank=9, **told)
    a, b, c = (f.delta() for f in factors)
    assert_close(dense(found), 0.5 * (a - 2 * b + 0.5 * c))


def test_short_deltas_count_for_the_bases_unless_norms_do() -> None:
    long, short = draw_factors(9, 12, 1, seed=1), draw_factors(9, 12, 1, seed=2)
    short = LoRAFactors(short.a, short.b / 100)

    def lost(by_norm: float) -> float:
        told = {"inner": "task_arithmetic", "weights": {"a": 0.0, "b": 1.0}, "scale": 1.0}
        found = compress_then_merge(
            [long, short], context=context(2), rank=1, by_norm=by_norm, **told
        )
        return float((dense(found) - short.delta()).norm() / short.delta().norm())

    assert lost(1.0) > 0.9
    assert lost(0.0) < 0.9
    assert torch.isfinite(torch.tensor(lost(0.5)))
