"""What the references of TIES do differently after the trim, and the delta that comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from icm_ray.linalg.consensus import Aggregate, Election, Vote, vote
from icm_ray.methods.shared.blocks import Blocks
from icm_ray.types import Delta

AggregateChoice = Annotated[
    Aggregate | None,
    Field(description="Mean or sum of the entries that agree; None for the preset's own."),
]


ElectionChoice = Annotated[
    Election | None,
    Field(description="Elect by the sum of values or of signs; None for the preset's own."),
]


@dataclass(frozen=True)
class Rules:
    """What the reference implementations disagree on after the trim.

    Attributes:
        by: Election by the sum of the values, or of their signs.
        aggregate: What becomes of the entries that agree.
        weights: Whether weights multiply before the election or after it.
        weighted_mean: Whether the mean divides by the weights of the tasks that agree, or by
            their number.
        rounded: How exact trims turn a share of the entries into a number: rounded and at least
            one, or rounded down.
    """

    by: Election = "values"
    aggregate: Aggregate = "mean"
    weights: Literal["before", "after"] = "before"
    weighted_mean: bool = False
    rounded: bool = False

    def count(self, density: float, size: int) -> int:
        """Return how many of `size` entries an exact trim keeps."""
        return max(round(density * size), 1) if self.rounded else int(density * size)

    def vote(
        self,
        weights: Sequence[float],
        scale: float,
        aggregate: Aggregate | None,
        zero: int,
        election: Election | None = None,
    ) -> Vote:
        """Return the rules as numbers; `zero` is the sign where the tasks cancel."""
        ones, numbers = torch.ones(len(weights)), torch.tensor(weights, dtype=torch.float32)
        before, after = (numbers, ones) if self.weights == "before" else (ones, numbers)
        shares = numbers if self.weighted_mean else ones
        if (aggregate or self.aggregate) == "sum":
            shares = torch.zeros(len(weights))
        return Vote(before, after * scale, shares, election or self.by, zero)


PAPER = Rules()
NSC = Rules(by="signs", aggregate="sum", rounded=True)
PEFT = Rules(weights="after")
MERGEKIT = Rules(weighted_mean=True)


def voted(
    blocks: Blocks, shape: tuple[int, int], least: Float[Tensor, " tasks"], how: Vote
) -> Delta:
    """Return the delta that `consensus.vote` makes of a module's blocks."""
    return Delta(shape, lambda: (vote(block, least, how) for block in blocks()))
