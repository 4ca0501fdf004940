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


def kth(parts: list[torch.Tensor], places: list[int], tasks: int) -> torch.Tensor:
    """Find each row's place-th smallest magnitude, by the digits that so many tasks would have."""
    above, place = radix.no_digits(len(places)), torch.tensor(places)
    for digit in radix.digits_for(tasks):
        counts = radix.no_counts(len(places), digit)
        for part in parts:
            radix.count(part, above, digit, counts)
        above, place = radix.pick(counts, above, place)
    return radix.magnitude(above)


@pytest.fixture(params=["compiled", "plain"])
def route(request, monkeypatch) -> None:
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(kernels, "compiled", lambda _loop: None)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("tasks", [2, 500])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_threshold_is_that_of_all_values_together(density: float, tasks: int) -> None:
    @given(st.lists(NUMBERS, min_size=1, max_size=40), st.integers(1, 7))
    def holds(numbers: list[float], size: int) -> None:
        values = torch.tensor(numbers)
        parts = [part[None] for part in values.split(size)]
        place = len(numbers) - int(len(numbers) * density)
        assert float(kth(parts, [place], tasks)) == threshold(values, density)

    holds()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("tasks", [2, 500])
def test_tasks_are_counted_apart(tasks: int) -> None:
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))
    ordered = values.abs().flatten(1).sort(dim=1).values
    expected = torch.stack([ordered[0, 0], ordered[1, 17], ordered[2, 34]])
    turned = [values.transpose(1, 2)]  # contiguous or not
    assert torch.equal(kth(turned, [1, 18, 35], tasks), expected)


def by_guess(values: torch.Tensor, start: torch.Tensor, place: torch.Tensor) -> torch.Tensor | None:
    counts = radix.no_counts_near(len(values))
    for part in values.chunk(3, dim=1):
        radix.count_near(part, start, counts)
    return radix.pick_near(counts, start, place)


@pytest.mark.usefixtures("route")
def test_some_of_the_values_are_enough_to_find_the_place_in_one_sweep() -> None:
    values = torch.randn(1, 2**11, 2**12, generator=torch.Generator().manual_seed(1))
    some, size = values[:, ::2], values.numel()
    counts = radix.no_counts(1, radix.digits_for(1)[0])
    radix.count(some, radix.no_digits(1), radix.digits_for(1)[0], counts)
    ordered = values.abs().flatten().sort().values
    for share in (0.2, 0.8, 0.99):
        start = radix.guess(counts, torch.tensor([int(some.numel() * share)]))
        found = by_guess(values.view(1, 8, -1).flatten(1), start, torch.tensor([int(size * share)]))
        assert found is not None
        assert found == ordered[int(size * share) - 1]


@pytest.mark.usefixtures("route")
def test_a_wrong_guess_is_seen() -> None:
    @given(st.lists(NUMBERS, min_size=1, max_size=40), st.data())
    def holds(numbers: list[float], data: st.DataObject) -> None:
        values = torch.tensor(numbers)[None]
        place = data.draw(st.integers(0, len(numbers)))
        about = data.draw(st.sampled_from(numbers))
        start = torch.tensor(abs(about)).view(torch.int32).long()[None]
        start = (start - data.draw(st.integers(0, radix.NEAR))).clamp(min=0)
        found = by_guess(values, start, torch.tensor([place]))
        expected = values.abs().sort().values[0, place - 1]
        bits = int(expected.view(torch.int32))
        if place > 0 and start <= bits < start + radix.NEAR:
            assert found == expected
        else:
            assert found is None

    holds()


def test_place_zero_is_below_every_value() -> None:
    counts, above = torch.tensor([[0, 3, 2, 0], [1, 0, 0, 0]]), torch.tensor([0, 5])
    found, place = radix.pick(counts, above, torch.tensor([0, 0]))
    assert (found.tolist(), place.tolist()) == ([0, 20], [0, 0])
    found, place = radix.pick(counts, above, torch.tensor([4, 1]))
    assert (found.tolist(), place.tolist()) == ([2, 20], [1, 1])


def test_the_digits_are_all_bits_but_the_sign() -> None:
    for tasks in (1, radix.FEW_TASKS, radix.FEW_TASKS + 1):
        digits = radix.digits_for(tasks)
        assert sum(digit.width for digit in digits) == 31
        tops = [31, *(digit.shift for digit in digits)]
        assert all(d.shift + d.width == top for d, top in zip(digits, tops, strict=False))
    assert max(len(radix.digits_for(n)) for n in (1, 1000)) == radix.MOST_DIGITS
