"""The compiled loops give the bits of the torch and numpy code beside them."""

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg import consensus, kernels, radix, sparsify
from icm_ray.linalg.consensus import Vote

numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-42]) | st.floats(
    -(2.0**60), 2.0**60, width=32
)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def both(run: Callable[[], torch.Tensor]) -> None:
    """Run with and without compiled loops and compare bits."""
    pytest.importorskip("numba")
    compiled = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "compiled", lambda _loop: None)
        plain = run()
    assert torch.equal(bits(compiled), bits(plain))


@st.composite
def blocks(draw) -> torch.Tensor:
    tasks, cols = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    values = draw(st.lists(numbers, min_size=tasks * 3 * cols, max_size=tasks * 3 * cols))
    return torch.tensor(values).view(tasks, 3, cols)


@given(blocks(), st.sampled_from([2, 500]))
def test_counts(values: torch.Tensor, tasks: int) -> None:
    above = radix.no_digits(len(values))
    for digit in radix.digits_for(tasks):

        def counts(digit: radix.Digit = digit, above: torch.Tensor = above) -> torch.Tensor:
            found = radix.no_counts(len(values), digit)
            radix.count(values, above, digit, found)
            return found

        both(counts)
        above, _ = radix.pick(counts(), above, torch.ones(len(values), dtype=torch.int64))


@given(blocks(), st.sampled_from([0.0, 0.5, 1.0, torch.inf]))
def test_counts_about_a_guess(values: torch.Tensor, about: float) -> None:
    start = torch.full((len(values),), int(torch.tensor(about).view(torch.int32)))

    def counts() -> torch.Tensor:
        found = radix.no_counts_near(len(values))
        radix.count_near(values, start, found)
        return found

    both(counts)


@given(
    blocks(),
    st.sampled_from(["values", "signs"]),
    st.sampled_from([-1, 0, 1]),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, -2.0, torch.inf]), min_size=16, max_size=16),
)
def test_votes(values, by, zero: int, drawn: list[float]) -> None:
    tasks = len(values)
    rows = torch.tensor(drawn).view(4, 4)[:, :tasks]
    least = rows[0].abs()
    before, after, shares = rows[1:].nan_to_num(posinf=3.0)
    how = Vote(before, after, shares, by, zero)
    both(lambda: consensus.vote(values, least, how))
    both(lambda: torch.tensor(consensus.sum_of_signs(values, least, before, by)))


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
def test_votes_of_sizes_around_a_chunk(size: int) -> None:
    values = torch.randn(5, 1, size, generator=torch.Generator().manual_seed(size))
    ones = torch.ones(5)
    for by in ("values", "signs"):
        both(lambda by=by: consensus.vote(values, ones * 0.3, Vote(ones, ones, ones, by, 1)))
        both(lambda by=by: torch.tensor(consensus.sum_of_signs(values, ones * 0.3, ones, by)))


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 0.999999999999])
def test_drops(density: float) -> None:
    values = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    keys = sparsify.row_keys(3, 7)

    def dropped() -> torch.Tensor:
        out = values.clone()
        sparsify.drop(out, keys, density, 1 / density)
        return out

    both(dropped)


@pytest.fixture
def forgotten():
    """Nothing is compiled yet, and nothing stays compiled."""
    kernels.compiled.cache_clear()
    yield
    kernels.compiled.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_without_numba_nothing_is_compiled(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert kernels.compiled(kernels.count_digit) is None


@pytest.mark.usefixtures("forgotten")
def test_compiles_where_nothing_can_be_written(monkeypatch) -> None:
    numba = pytest.importorskip("numba")
    asked = []

    def njit(*functions, **options):
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return functions[0]

    monkeypatch.setattr(numba, "njit", njit)
    assert kernels.compiled(kernels.count_digit) is not None
    assert asked == [{"cache": True}, {}]
