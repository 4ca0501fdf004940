"""k-means on points that are known by their inner products alone.

A centre is the mean of its members, so every distance follows from the Gram matrix of the points;
their own length, thousands of numbers each, costs nothing.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SAME_POINT = 1e-12
"""Squared distances below this share of the largest squared length are rounding."""


def spread_out(
    gram: Float[Tensor, "points points"], count: int, draw: torch.Generator
) -> Int[Tensor, " chosen"]:
    """Return up to `count` points to start from, each drawn far from those before (k-means++).

    Paper: k-means++, Arthur and Vassilvitskii 2007: the next point is drawn with probability
    proportional to its squared distance to the nearest chosen one. Fewer points come back where
    fewer are distinct.
    """
    squares = gram.diagonal()
    chosen = [int(torch.randint(len(squares), (), generator=draw, device="cpu"))]
    nearest = torch.full_like(squares, torch.inf)
    while len(chosen) < count:
        latest = chosen[-1]
        nearest = torch.minimum(nearest, squares + squares[latest] - 2 * gram[latest])
        nearest[nearest <= SAME_POINT * squares.max()] = 0
        reached = nearest.cumsum(0)
        if reached[-1] == 0:
            break
        share = torch.rand((), generator=draw, dtype=torch.float64, device="cpu")
        target = reached[-1] * share
        chosen.append(int(torch.searchsorted(reached, target, right=True)))
    return torch.tensor(chosen)


def lloyd(
    gram: Float[Tensor, "points points"], first: Int[Tensor, " clusters"], iterations: int
) -> Int[Tensor, " points"]:
    """Return each point's cluster after some rounds of assigning points and moving centres.

    Args:
        gram: Inner products of the points, float64.
        first: The points that are the first centres.
        iterations: Rounds, at least 1; the labels are those of the last assignment. A cluster that
            loses all its points keeps its centre.
    """
    centres = torch.nn.functional.one_hot(first, len(gram)).to(gram.dtype)
    labels = torch.full((len(gram),), -1)
    for _ in range(iterations):
        before = labels
        to_points = centres @ gram
        squares = (to_points * centres).sum(1, keepdim=True)
        labels = (squares - 2 * to_points).argmin(0)
        if torch.equal(labels, before):
            break
        means = averages(labels, len(first)).to(gram.dtype)
        centres = torch.where(means.any(1, keepdim=True), means, centres)
    return labels


def averages(labels: Int[Tensor, " points"], clusters: int) -> Float[Tensor, "clusters points"]:
    """Return the matrix that averages points cluster by cluster, float64; empty clusters are 0."""
    members = torch.nn.functional.one_hot(labels, clusters).T.double()
    return members / members.sum(1, keepdim=True).clamp(min=1)
