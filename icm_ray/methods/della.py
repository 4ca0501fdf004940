"""DELLA: drop entries by chance, the smaller the likelier, elect signs, average who agrees."""

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from icm_ray.errors import RecipeError
from icm_ray.linalg.sparsify import drop_by_rank, row_keys
from icm_ray.methods.shared.blocks import Density, deltas
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights, usual
from icm_ray.methods.shared.votes import PAPER, AggregateChoice, voted
from icm_ray.seeding import seed_for
from icm_ray.types import Delta, LoRAFactors, ModuleContext


def della(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    # epsilon has to be less than twice the density.
    density: Annotated[Density, usual("uniform(0.2, 1)")] = 0.5,
    epsilon: Annotated[
        float,
        Field(ge=0, lt=1, description="Width of the range of probabilities in a row."),
        usual("uniform(0, 0.3)"),
    ] = 0.2,
    scale: Scale = 1.0,
    weights: Weights = None,
    aggregate: AggregateChoice = None,
) -> Delta:
    """Drop the smaller entries of each row more often, elect signs, average those that agree.

    Paper: arXiv 2406.11617, section 3: in a row of n entries the one of rank r (0 is the largest)
    is kept with probability `p = density + epsilon / 2 - epsilon * r / n`, at most 1, and
    multiplied by `1 / p`; then election and mean of TIES over weighted entries. `density` 1 keeps
    everything. Differs: mergekit's epsilon is half of this one. Where entries cancel the sign is +.

    Raises:
        RecipeError: some probability would not be positive.
    """
    if density <= epsilon / 2:
        raise RecipeError(
            f"params.epsilon: {epsilon} but less than twice the density {density} is expected."
        )
    factors = list(factors)
    rows = factors[0].shape[0]
    seeds = [seed_for(context.seed, task, context.module, "della") for task in context.tasks]
    keys = [row_keys(seed, rows) for seed in seeds]

    def blocks() -> Iterator[Tensor]:
        start = 0
        for block in deltas(factors):
            part = slice(start, start + block.shape[1])
            start = part.stop
            for values, own in zip(block, keys, strict=True):
                if density < 1:
                    drop_by_rank(values, own[part], density, epsilon)
            yield block

    numbers = task_weights(context, weights, default=1.0)
    how = PAPER.vote(numbers, scale, aggregate, 1)
    return voted(blocks, factors[0].shape, torch.zeros(len(factors)), how)
