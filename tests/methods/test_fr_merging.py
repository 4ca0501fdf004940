"""FR-Merging against filters of dense matrices, and its two routes against each other."""

import pytest
import torch
from factor_samples import assert_close, check, context, dense, draw_factors, for_any_stack

from icm_ray.linalg.fourier import HighPass
from icm_ray.methods.fr_merging import fr_merging
from icm_ray.types import Delta, LoRAFactors


def written_out(factors, ratio: float, scale: float, align: bool, free: bool) -> torch.Tensor:
    high_pass = HighPass(factors[0].shape, ratio, free)
    filtered = [high_pass.apply(f.delta()) for f in factors]
    means = [float(x.abs().mean()) for x in filtered]
    factor = [max(means) / mean if align else 1.0 for mean in means]
    return scale * sum(c * x for c, x in zip(factor, filtered, strict=True))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_what_every_merge_promises(align: bool, ratio: float) -> None:
    @for_any_stack
    def promises(factors: list[LoRAFactors]) -> None:
        check(lambda f, **told: fr_merging(f, align=align, ratio=ratio, **told), factors)

    promises()


@for_any_stack
def test_a_radius_beyond_the_corners_gives_one_adapter_back(factors: list[LoRAFactors]) -> None:
    found = fr_merging(factors[:1], context=context(1), ratio=100.0, scale=1.0)
    assert_close(dense(found), factors[0].delta())


@pytest.mark.parametrize(
    "shape", [(64, 64), (65, 65), (64, 63), (40, 90), (90, 40), (1, 8), (8, 1)]
)
@pytest.mark.parametrize("ratio", [0.5, 0.68, 0.7])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("preset", ["fr", "free"])
def test_it_is_the_sum_of_the_filtered_deltas(shape, ratio, align, preset) -> None:
    factors = [draw_factors(*shape, rank, seed=rank, scaling=rank) for rank in (1, 2)]
    told = {"ratio": ratio, "align": align, "preset": preset}
    found = fr_merging(factors, context=context(2), **told)
    expected = written_out(factors, ratio, 0.7, align, preset == "free")
    torch.testing.assert_close(dense(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["fr", "free"])
def test_squares_give_factors_and_others_a_dense_delta(preset: str) -> None:
    for shape, kind in (((96, 96), LoRAFactors), ((96, 60), Delta)):
        factors = [draw_factors(*shape, 2, seed) for seed in range(3)]
        assert isinstance(fr_merging(factors, context=context(3), preset=preset), kind)
    square = fr_merging([draw_factors(96, 96, 2)], context=context(1), preset="fr")
    assert isinstance(square, LoRAFactors)
    assert square.rank == 2 + HighPass((96, 96), 0.7).removed_rank() < 10


def test_a_dense_sum_of_very_many_adapters_is_filtered_as_well(monkeypatch) -> None:
    factors = [draw_factors(64, 64, 20, seed) for seed in range(4)]
    expected = dense(fr_merging(factors, context=context(4)))
    monkeypatch.setattr("icm_ray.methods.shared.weighted_sum.STACKED_ENTRIES", 1)
    assert_close(dense(fr_merging(factors, context=context(4))), expected)


def test_alignment_brings_tasks_to_the_largest_mean_magnitude() -> None:
    one = draw_factors(32, 32, 2)
    small = LoRAFactors(one.a, one.b / 50)
    aligned = dense(fr_merging([one, small], context=context(2), scale=1.0))
    alone = dense(fr_merging([one], context=context(1), scale=1.0))
    assert_close(aligned, 2 * alone)


def test_a_task_that_is_all_low_frequency_is_not_blown_up() -> None:
    flat = LoRAFactors(torch.full((1, 64), 0.3), torch.full((64, 1), 0.7))
    one = draw_factors(64, 64, 2)
    told = context(2)
    found = dense(fr_merging([flat, one], context=told))
    assert_close(found, dense(fr_merging([one], context=context(1))))
