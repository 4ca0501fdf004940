"""Magnitude pruning: the largest entries of each delta, added up."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from icm_ray.methods.shared.blocks import Density, added, deltas
from icm_ray.methods.shared.factor_wise import Side, factor_wise, largest_of_each
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights
from icm_ray.methods.shared.trim import exactly
from icm_ray.types import Delta, LoRAFactors, ModuleContext


def magnitude_prune(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    density: Density = 0.2,
    scale: Scale = 1.0,
    weights: Weights = None,
    preset: Annotated[
        Literal["delta", "peft"],
        Field(description="delta: prune the deltas; peft: A and B apart, then multiply."),
    ] = "delta",
) -> LoRAFactors | Delta:
    """Add up the largest entries of each delta: `scale * sum_k w_k top(delta_k)`.

    Paper: peft add_weighted_adapter(magnitude_prune_svd, and magnitude_prune as preset `peft`).
    `top` keeps the `int(density * n)` entries of largest magnitude of a module and task; weights
    are 1 unless given. Differs: of equal entries the first are kept, where PEFT keeps any.
    """
    numbers = task_weights(context, weights, default=1.0)
    if preset == "peft":

        def add(values: Tensor, numbers: Tensor, _side: Side) -> Tensor:
            return torch.tensordot(numbers, largest_of_each(values, density), dims=1)

        return factor_wise(factors, context, numbers, scale, add)
    factors = list(factors)
    trim = exactly(lambda: deltas(factors), len(factors), lambda size: int(density * size))

    def blocks() -> Iterator[Tensor]:
        return trim.of(deltas(factors))

    return added(blocks, factors[0].shape, [scale * number for number in numbers])
