import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg import kernels, radix
from icm_ray.linalg.sparsify import threshold

DENORMAL = 1e-42
# Few different numbers, so that many are equal, and any other float32 that is finite.
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, DENORMAL, -DENORMAL, 3e38]) | st.floats(
    width=32, allow_nan=False, allow_infinity=False
)


def kth(parts: list[torch.Tensor], place: int) -> float:
    """Find the place-th smallest magnitude of values that come in parts, `(1, n)` each."""
    high_counts = radix.no_counts(1, radix.HIGH_BINS)
    for part in parts:
        radix.count_high(part, high_counts)
    high, inside = radix.pick(high_counts, torch.tensor([place]))
    low_counts = radix.no_counts(1, radix.LOW_BINS)
    for part in parts:
        radix.count_low(part, high, low_counts)
    low, _ = radix.pick(low_counts, inside)
    return float(radix.magnitude(high, low))


@pytest.fixture(params=["compiled", "plain"])
def route(request, monkeypatch) -> None:
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(kernels, "compiled", lambda _loop: None)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_threshold_is_that_of_all_values_together(density: float) -> None:
    @given(st.lists(NUMBERS, min_size=1, max_size=40), st.integers(1, 7))
    def holds(numbers: list[float], size: int) -> None:
        values = torch.tensor(numbers)
        parts = [part[None] for part in values.split(size)]
        place = len(numbers) - int(len(numbers) * density)
        assert kth(parts, place) == threshold(values, density)

    holds()


@pytest.mark.usefixtures("route")
def test_tasks_are_counted_apart() -> None:
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))
    counts = radix.no_counts(3, radix.HIGH_BINS)
    radix.count_high(values, counts)
    assert counts.sum(1).tolist() == [35, 35, 35]
    high, inside = radix.pick(counts, torch.tensor([1, 18, 35]))
    low_counts = radix.no_counts(3, radix.LOW_BINS)
    radix.count_low(values.transpose(1, 2), high, low_counts)  # contiguous or not
    low, _ = radix.pick(low_counts, inside)
    ordered = values.abs().flatten(1).sort(dim=1).values
    expected = torch.stack([ordered[0, 0], ordered[1, 17], ordered[2, 34]])
    assert torch.equal(radix.magnitude(high, low), expected)


def test_place_zero_is_below_every_value() -> None:
    counts = torch.tensor([[0, 3, 2], [1, 0, 0]])
    found, place = radix.pick(counts, torch.tensor([0, 0]))
    assert (found.tolist(), place.tolist()) == ([0, 0], [0, 0])
    found, place = radix.pick(counts, torch.tensor([4, 1]))
    assert (found.tolist(), place.tolist()) == ([2, 0], [1, 1])
