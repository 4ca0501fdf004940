import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg.sparsify import draws, drop, drop_by_rank, largest, row_keys, threshold

few = st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0]), min_size=1, max_size=20)


@given(few, st.floats(0, 1))
def test_a_threshold_keeps_enough_and_what_is_equal(numbers: list[float], density: float) -> None:
    values = torch.tensor(numbers)
    kept = values.abs() >= threshold(values, density)
    assert kept.sum() >= int(len(numbers) * density)
    assert kept[~kept.logical_not()].all()
    if kept.any() and not kept.all():
        assert values[kept].abs().min() > values[~kept].abs().max()


@given(few, st.integers(-1, 25))
def test_the_largest_are_exactly_so_many_and_the_first(numbers: list[float], count: int) -> None:
    values = torch.tensor(numbers)
    order = values.abs().argsort(descending=True, stable=True)
    expected = torch.zeros(len(numbers), dtype=torch.bool)
    expected[order[: max(count, 0)]] = True
    assert torch.equal(largest(values, count), expected)


def test_a_row_draws_alike_in_any_block() -> None:
    keys = row_keys(5, 10)
    whole = draws(keys, 33)
    assert np.array_equal(whole[4:7], draws(keys[4:7], 33))
    assert np.array_equal(whole[:, :8], draws(keys, 8))
    assert not np.array_equal(whole, draws(row_keys(6, 10), 33))


def test_draws_are_uniform_and_unrelated() -> None:
    uniform = torch.from_numpy(draws(row_keys(11, 400), 1000) / 2**32)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / 4e5) ** 0.5)
    counts = torch.histc(uniform, 256, 0, 1)
    expected = uniform.numel() / 256
    chi_square = float(((counts - expected).square() / expected).sum())
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
    centred = uniform - uniform.mean()
    for other in (
        centred.roll(1, 1),  # the entry beside
        centred.roll(1, 0),  # the row above
        torch.from_numpy(draws(row_keys(12, 400), 1000) / 2**32) - 0.5,  # another task
    ):
        correlation = float((centred * other).mean() * 12)
        assert abs(correlation) < 5 / uniform.numel() ** 0.5


@pytest.mark.parametrize("density", [0.001, 0.1, 0.9])
def test_as_many_are_kept_as_asked_in_every_row_and_column(density: float) -> None:
    values = torch.ones(500, 2000)
    drop(values, row_keys(1, 500), density, 1 / density)
    kept = (values != 0).double()
    spread = (density * (1 - density)) ** 0.5
    assert float(kept.mean()) == pytest.approx(density, abs=5 * spread / 1000)
    for axis in (0, 1):
        n = values.shape[axis]
        shares = kept.mean(axis)
        assert float(shares.var()) == pytest.approx(spread**2 / n, rel=0.35)
    assert float(values.max()) == pytest.approx(1 / density)


def test_small_entries_of_a_row_are_dropped_more_often() -> None:
    ascending = torch.arange(1.0, 101.0).repeat(4000, 1)
    values = ascending.clone()
    drop_by_rank(values, row_keys(2, 4000), 0.5, 0.4)
    rank = torch.arange(100).flip(0)
    expected = 0.5 + 0.4 * (0.5 - rank / 100)
    kept = (values != 0).float().mean(0)
    torch.testing.assert_close(kept, expected, rtol=0, atol=5 * 0.5 / 4000**0.5)
    torch.testing.assert_close(values.max(0).values, ascending[0] / expected)
    torch.testing.assert_close(values.mean(0) / ascending[0], torch.ones(100), rtol=0, atol=0.1)
