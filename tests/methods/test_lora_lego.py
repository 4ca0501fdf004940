"""LoRA-LEGO against k-means on the units themselves; zero units, signs, first units, speed."""

import time

import pytest
import torch
from factor_samples import (
    TOY,
    assert_close,
    check,
    context,
    dense,
    draw_factors,
    for_any_stack,
)

from icm_ray.errors import InputError
from icm_ray.methods.lora_lego import lora_lego
from icm_ray.types import LoRAFactors


def broadcast_lego(
    factors: list[LoRAFactors], first: torch.Tensor, iterations: int = 10, *, nsc: bool = True
) -> torch.Tensor:
    """Return the merge by k-means that compares every unit with every centre, entry by entry."""
    raw = torch.cat([torch.cat([f.a, f.b.T], 1) for f in factors])
    d_in, clusters = factors[0].shape[1], len(first)
    a, b = raw[:, :d_in], raw[:, d_in:]
    units = torch.cat([a / a.norm(dim=1)[:, None], b / b.norm(dim=1)[:, None]], 1) if nsc else raw
    centres = units[first].clone()
    for _ in range(iterations):
        labels = (units[:, None] - centres).square().sum(2).argmin(1)
        for cluster in range(clusters):
            if (labels == cluster).any():
                centres[cluster] = units[labels == cluster].mean(0)
    total = torch.zeros(factors[0].shape)
    for cluster in labels.unique():
        members = raw[labels == cluster]
        mean = members.mean(0)
        if nsc:
            factor = members.abs().amax(1).mean() / mean.abs().max()
        else:
            factor = members.norm(dim=1).mean() / mean.norm()
        total += factor**2 * torch.outer(mean[d_in:], mean[:d_in])
    return total * (factors[0].rank / clusters) ** 0.5


@pytest.mark.parametrize("preset", ["lego", "nsc"])
@pytest.mark.parametrize("sign_canonical", [False, True])
def test_what_every_merge_promises(preset: str, sign_canonical: bool) -> None:
    def merge(factors, **told):
        return lora_lego(factors, preset=preset, sign_canonical=sign_canonical, **told)

    @for_any_stack
    def promises(factors: list[LoRAFactors]) -> None:
        check(merge, factors, homogeneous=False, gauge_free=False)
        assert_close(dense(merge(factors[:1], context=context(1))), factors[0].delta())

    promises()


def test_toy_value() -> None:
    found = lora_lego(TOY, context=context(2), preset="nsc", rank=1)
    expected = torch.tensor([[0.8889, 2.6667], [0.4444, 1.3333]])
    torch.testing.assert_close(dense(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("nsc", [True, False])
@pytest.mark.parametrize("clusters", [1, 3, 8])
def test_it_is_k_means_on_the_units(clusters: int, nsc: bool) -> None:
    factors = [draw_factors(20, 15, 4, seed) for seed in range(5)]
    first = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:clusters]
    found = lora_lego(
        factors,
        context=context(5),
        evidence={"init_idx": first},
        preset="nsc" if nsc else "lego",
    )
    assert found.rank == clusters
    assert_close(dense(found), broadcast_lego(factors, first, nsc=nsc))


def test_weights_of_clusters_can_be_left_off() -> None:
    factors = [draw_factors(20, 15, 4, seed) for seed in range(3)]
    plain = {"context": context(3), "rank": 2, "parameter_reweight": False, "scale": 0.5}
    one = dense(lora_lego(factors, **plain, output_reweight=False))
    assert_close(dense(lora_lego(factors, **plain)), 2**0.5 * one)
    a, b = (torch.cat(x) for x in ([f.a for f in factors], [f.b.T for f in factors]))
    every = {**plain, "rank": 1, "output_reweight": False}
    assert_close(dense(lora_lego(factors, **every)), 0.5 * torch.outer(b.mean(0), a.mean(0)))


def test_a_cluster_for_each_unit_is_the_sum() -> None:
    factors = [draw_factors(9, 8, rank, seed=rank) for rank in (2, 4, 1)]
    total = sum(f.delta() for f in factors)
    for rank in (7, 50):
        found = lora_lego(factors, context=context(3), rank=rank)
        assert found.rank == 7
        assert_close(dense(found), (4 / 7) ** 0.5 * total)


def test_the_default_rank_is_the_largest_number_of_units_that_are_not_zero() -> None:
    factors = [draw_factors(9, 8, rank, seed=rank) for rank in (2, 4, 3)]
    factors[1].b[:, 0] = 0
    assert lora_lego(factors, context=context(3)).rank == 3


def test_units_turned_around_meet_only_with_canonical_signs() -> None:
    one = draw_factors(9, 8, 3)
    turned = LoRAFactors(-one.a, -one.b)
    told = context(2)
    assert_close(dense(lora_lego([one, turned], context=told, sign_canonical=True)), one.delta())
    apart = dense(lora_lego([one, turned], context=told))
    assert (apart - one.delta()).norm() > 0.1 * one.delta().norm()


def test_each_module_and_seed_draws_its_own_first_units() -> None:
    factors = [draw_factors(9, 8, 4, seed) for seed in range(5)]
    told = context(5)
    plain = lora_lego(factors, context=told)
    assert torch.equal(plain.a, lora_lego(factors, context=told).a)
    kinds = {"tasks": told.tasks, "all_tasks": told.all_tasks}
    others = [type(told)("n", **kinds), type(told)("m", **kinds, seed=1)]
    assert not any(torch.equal(plain.a, lora_lego(factors, context=c).a) for c in others)


def test_first_units_are_counted_with_those_that_are_zero() -> None:
    factors = [draw_factors(9, 8, 3, seed) for seed in range(2)]
    expected = lora_lego(factors, context=context(2), evidence={"init_idx": torch.tensor([1, 4])})
    factors[0] = LoRAFactors(
        torch.cat([torch.ones(1, 8), factors[0].a]), torch.cat([torch.zeros(9, 1), factors[0].b], 1)
    )
    given = torch.tensor([2, 0, 5], dtype=torch.int32)
    found = lora_lego(factors, context=context(2), evidence={"init_idx": given})
    assert torch.equal(found.a, expected.a)
    for nothing in ([0], []):  # drawn instead
        told = {"init_idx": torch.tensor(nothing, dtype=torch.int64)}
        drawn = lora_lego(factors, context=context(2), evidence=told)
        assert torch.equal(drawn.a, lora_lego(factors, context=context(2)).a)


@pytest.mark.parametrize("outside", [6, -1])
def test_first_units_that_are_not_there_are_refused(outside: int) -> None:
    factors = [draw_factors(9, 8, 3, seed) for seed in range(2)]
    with pytest.raises(InputError, match=rf"m\.init_idx: {outside} but units 0 to 5"):
        lora_lego(factors, context=context(2), evidence={"init_idx": torch.tensor([0, outside])})


@pytest.mark.slow
def test_it_is_much_faster_than_k_means_on_the_units() -> None:
    factors = [draw_factors(4096, 4096, 16, seed) for seed in range(6)]
    first = torch.arange(0, 96, 6)
    told = {"context": context(6), "evidence": {"init_idx": first}, "preset": "nsc"}
    seconds = []
    for run, times in (
        (lambda: lora_lego(factors, **told), 5),
        (lambda: broadcast_lego(factors, first), 1),
    ):
        each = []
        for _ in range(times):
            start = time.process_time()
            found = run()
            each.append(time.process_time() - start)
        seconds.append(min(each))
    assert_close(dense(lora_lego(factors, **told)), found)
    assert seconds[1] > 40 * seconds[0]
