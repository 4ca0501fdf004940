"""k-means in the Gram matrix beside k-means on the points."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg.clusters import averages, lloyd, spread_out


def plain_kmeans(x: torch.Tensor, first: torch.Tensor, iterations: int) -> torch.Tensor:
    centres = x[first].clone()
    for _ in range(iterations):
        labels = torch.cdist(x, centres).argmin(1)
        for cluster in range(len(centres)):
            if (labels == cluster).any():
                centres[cluster] = x[labels == cluster].mean(0)
    return labels


@given(st.integers(2, 20), st.integers(1, 6), st.integers(1, 12), st.integers(0, 40))
def test_the_labels_are_those_of_k_means_on_the_points(
    points: int, clusters: int, iterations: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(points, 7, generator=draw, dtype=torch.float64)
    first = torch.randperm(points, generator=draw)[:clusters]
    labels = lloyd(x @ x.T, first, iterations)
    assert torch.equal(labels, plain_kmeans(x, first, iterations))
    means = averages(labels, len(first)) @ x
    for cluster in range(len(first)):
        members = x[labels == cluster]
        expected = members.mean(0) if len(members) else torch.zeros(7).double()
        torch.testing.assert_close(means[cluster], expected)


@given(st.integers(0, 30))
def test_separate_groups_are_found_and_equal_points_drawn_once(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    groups = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1, 2, 0, 1, 0]]
    gram = groups @ groups.T
    first = spread_out(gram, 4, draw)
    labels = lloyd(gram, first, 10)
    assert len({tuple(groups[i].tolist()) for i in first}) == 4
    for i in range(4):
        assert len(labels[groups[:, i] == 1].unique()) == 1
    assert len(spread_out(gram, 7, draw)) == 4  # no more than four are distinct


def test_the_same_seed_draws_the_same_points() -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = (spread_out(x @ x.T, 5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert len(one.unique()) == 5
