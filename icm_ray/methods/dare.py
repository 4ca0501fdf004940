"""DARE: drop entries by chance, rescale the others, add."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from icm_ray.methods.shared.blocks import Density, added, deltas, dropped
from icm_ray.methods.shared.factor_wise import Side, dropped_of_each, factor_wise
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights, usual
from icm_ray.types import Delta, LoRAFactors, ModuleContext, ModuleEvidence


def dare(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    density: Annotated[Density, usual("uniform(0.1, 1)")] = 0.1,  # fewer: louder noise
    scale: Scale = 1.0,
    weights: Weights = None,
    preset: Annotated[
        Literal["dare", "peft"],
        Field(description="dare: drop entries of the deltas; peft: of A and of B, then multiply."),
    ] = "dare",
) -> LoRAFactors | Delta:
    """Keep entries by chance and add them up: `scale * sum_k w_k (M_k * delta_k) / density`.

    Paper: arXiv 2311.03099, Eq. 2 and 3; M_k is 1 with probability `density = 1 - p`. Weights are
    1 unless given, as in `task_arithmetic`, of which this is an unbiased, noisy estimate.
    Differs: PEFT's `dare_linear` (preset `peft`) drops entries of A and of B; the expected value
    of their product is that of `linear`, cross terms included, and needs equal ranks.

    The seed, task and module key the draws. Evidence `mask.<task>` (preset `peft`: `mask_a.<task>`
    and `mask_b.<task>`) takes their place.
    """
    numbers = task_weights(context, weights, default=1.0)
    if preset == "peft":

        def add(values: Tensor, numbers: Tensor, side: Side) -> Tensor:
            kept = dropped_of_each(values, side, context, density, evidence)
            return torch.tensordot(numbers, kept, dims=1)

        return factor_wise(factors, context, numbers, scale, add)
    factors = list(factors)
    shape = factors[0].shape

    def blocks() -> Iterator[Tensor]:
        return dropped(deltas(factors), context, shape, density, evidence)

    return added(blocks, shape, [scale * number for number in numbers])
