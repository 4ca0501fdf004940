"""RobustMerge against its steps written out; rows pruned whole, ranks, scalings."""

import pytest
import torch
from factor_samples import assert_close, check, context, dense, draw_factors, for_any_stack

from icm_ray.methods.robust_merge import robust_merge
from icm_ray.types import LoRAFactors


def pruned(x: torch.Tensor, density: float) -> torch.Tensor:
    order = x.abs().flatten().sort().values
    dropped = int(x.numel() * (1 - density))
    return x * (x.abs() >= order[dropped - 1]) if dropped else x


def written_out(factors: list[LoRAFactors], density: float, top: float, w: float) -> torch.Tensor:
    """Return the merge of adapters of one rank and scaling 1, none of whose rows vanish."""
    total_a, total_b, total_s = 0, 0, 0
    for f in factors:
        a, b = pruned(f.a, density), pruned(f.b, density)
        s = f.a.abs().sum(1) / a.abs().sum(1)
        s = s.clamp(min=s.sort().values[int(len(s) * (1 - top))])
        total_a, total_b, total_s = total_a + w * a, total_b + w * b * s, total_s + s
    return (total_b / total_s) @ total_a


@for_any_stack
def test_what_every_merge_promises(factors: list[LoRAFactors]) -> None:
    check(robust_merge, factors, gauge_free=False)


@for_any_stack
def test_one_adapter_unpruned_and_unweighted_comes_back(factors: list[LoRAFactors]) -> None:
    for preset in ("robust", "raw"):
        one = factors[0]
        found = robust_merge(
            [one], context=context(1), density=1.0, weights={"a": 1.0}, preset=preset
        )
        expected = one.delta() if preset == "robust" else one.delta() / one.scaling
        assert_close(dense(found), expected)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("attention_ratio", [0.2, 0.5, 1.0])
def test_the_steps(density: float, attention_ratio: float) -> None:
    factors = [draw_factors(12, 40, 5, seed) for seed in range(3)]
    found = robust_merge(
        factors, context=context(3), density=density, attention_ratio=attention_ratio, scale=0.5
    )
    assert found.rank == 5
    assert_close(dense(found), 0.5 * written_out(factors, density, attention_ratio, 2.0))


def test_scalings_go_half_to_either_factor_or_nowhere() -> None:
    plain = [draw_factors(12, 15, 4, seed) for seed in range(2)]
    scaled = [LoRAFactors(f.a, f.b * s, s) for f, s in zip(plain, (4.0, -0.25), strict=True)]
    halves = [
        LoRAFactors(f.a * s, f.b * t) for f, s, t in zip(plain, (2, 0.5), (2, -0.5), strict=True)
    ]
    told = context(2)
    assert_close(
        dense(robust_merge(scaled, context=told)), dense(robust_merge(halves, context=told))
    )
    assert_close(
        dense(robust_merge(scaled, context=told, preset="raw")),
        dense(robust_merge(plain, context=told)),
    )


def test_an_alpha_of_zero_is_bearable() -> None:
    one = draw_factors(12, 15, 2)
    silent = LoRAFactors(one.a, torch.zeros(12, 2), scaling=0.0)
    assert dense(robust_merge([silent], context=context(1))).count_nonzero() == 0


def test_weights_are_on_both_factors() -> None:
    factors = [draw_factors(12, 15, 4, seed) for seed in range(2)]
    three = robust_merge(factors, context=context(2), weights={"a": 3.0, "b": 3.0})
    assert_close(dense(three), 9 / 4 * dense(robust_merge(factors, context=context(2))))


def test_a_rank_whose_row_is_pruned_whole_takes_no_part() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 10, generator=draw), torch.randn(6, 3, generator=draw)
    a[1] *= 1e-3
    other = draw_factors(6, 10, 3, seed=1)
    found = robust_merge(
        [LoRAFactors(a, b), other], context=context(2), density=0.6, attention_ratio=1.0
    )
    kept_b, kept_a = pruned(b, 0.6), pruned(a, 0.6)
    assert kept_a[1].count_nonzero() == 0
    s = a.abs().sum(1) / kept_a.abs().sum(1)
    own_b, own_a = pruned(other.b, 0.6), pruned(other.a, 0.6)
    own_s = other.a.abs().sum(1) / own_a.abs().sum(1)
    expected_b = 2 * own_b
    for j in (0, 2):
        expected_b[:, j] = 2 * (kept_b[:, j] * s[j] + own_b[:, j] * own_s[j]) / (s[j] + own_s[j])
    assert_close(dense(found), expected_b @ (2 * (kept_a + own_a)))


def test_smaller_ranks_end_in_zeros_that_take_no_part() -> None:
    small, large = draw_factors(6, 10, 2), draw_factors(6, 10, 4, seed=1)
    found = robust_merge([small, large], context=context(2), density=1.0, attention_ratio=1.0)
    b = large.b.clone()
    b[:, :2] = (b[:, :2] + small.b) / 2
    a = large.a.clone()
    a[:2] += small.a
    assert_close(dense(found), 4 * b @ a)
