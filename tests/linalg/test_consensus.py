import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg.consensus import (
    Vote,
    agreeing,
    elected_signs,
    majority,
    sum_of_signs,
    vote,
)

few = st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0])


@st.composite
def blocks(draw) -> torch.Tensor:
    tasks, n = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return torch.tensor(draw(st.lists(few, min_size=tasks * n, max_size=tasks * n))).view(tasks, n)


def one_entry(column: list[float], least: float, by: str, zero: int, aggregate: str) -> float:
    """Vote on one entry in plain Python."""
    kept = [x for x in column if abs(x) >= least]
    total = sum(kept) if by == "values" else sum((x > 0) - (x < 0) for x in kept)
    sign = (total > 0) - (total < 0) or zero
    agree = [x for x in kept if x * sign > 0]
    return sum(agree) / (max(len(agree), 1) if aggregate == "mean" else 1)


@given(
    blocks(),
    st.sampled_from([0.0, 1.5, torch.inf]),
    st.sampled_from(["values", "signs"]),
    st.sampled_from([-1, 0, 1]),
    st.sampled_from(["mean", "sum"]),
)
def test_a_vote_is_that_of_each_entry(values, least, by, zero, aggregate) -> None:
    before = values.clone()
    tasks = len(values)
    ones = torch.ones(tasks)
    how = Vote(ones, ones, ones if aggregate == "mean" else torch.zeros(tasks), by, zero)
    found = vote(values, torch.full((tasks,), least), how)
    expected = [one_entry(c, least, by, zero, aggregate) for c in values.T.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(values, before)


@given(blocks(), st.sampled_from(["values", "signs"]))
def test_a_vote_is_the_election_and_those_that_agree(values, by) -> None:
    signs = elected_signs(values, by)
    ones, zeros = torch.ones(len(values)), torch.zeros(len(values))
    found = vote(values, zeros, Vote(ones, ones, ones, by))
    assert torch.equal(found, agreeing(values, signs))
    assert sum_of_signs(values, zeros, ones, by) == int(majority(signs))


def test_weights_before_and_after_the_election() -> None:
    values = torch.tensor([[3.0], [-2.0]])
    ones, least = torch.ones(2), torch.zeros(2)
    weights = torch.tensor([0.5, 2.0])
    before = vote(values, least, Vote(weights, ones, ones))
    after = vote(values, least, Vote(ones, weights, ones))
    shared = vote(values, least, Vote(weights, ones, weights))
    assert [x.item() for x in (before, after, shared)] == [-4.0, 1.5, -2.0]


@pytest.mark.parametrize(("aggregate", "expected"), [("mean", 2.0), ("sum", 4.0)])
def test_the_mean_divides_by_those_that_agree(aggregate, expected: float) -> None:
    values = torch.tensor([[1.0], [3.0], [-1.0]])
    assert agreeing(values, torch.ones(1), aggregate=aggregate).item() == expected
    weighted = agreeing(values, torch.ones(1), aggregate=aggregate, weights=[2.0, 2.0, 9.0])
    assert weighted.item() == 2 * expected
