"""Linear merging of the factors themselves, cross terms included."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from icm_ray.methods.shared.parameters import Scale, Weights, task_weights
from icm_ray.types import LoRAFactors, ModuleContext


def linear(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    weights: Weights = None,
    scale: Scale = 1.0,
    preset: Annotated[
        Literal["peft", "nsc"],
        Field(description="peft: sqrt of weight on both factors; nsc: weight on B alone."),
    ] = "peft",
) -> LoRAFactors:
    """Add A and B separately: `scale * (sum_k beta_k B_k)(sum_k alpha_k A_k)`.

    With B_k raw and s_k the adapter's scaling, preset `peft` (PEFT's `combination_type="linear"`)
    takes `w_k = 1/K`, `beta_k = sqrt|w_k s_k|` and `alpha_k = sign(w_k s_k) sqrt|w_k s_k|`;
    preset `nsc` (baseline of arXiv 2603.26317) takes `w_k = 1`, `beta_k = w_k s_k`, `alpha_k = 1`.
    Differs: unequal ranks are padded with zeros where the references refuse them.

    The product holds every `B_i A_j`, so this is not the average of the deltas and the result
    depends on how each adapter splits its delta into B and A. It is here as a baseline.
    """
    factors = list(factors)  # each is looked at several times
    if preset == "nsc":
        numbers = task_weights(context, weights, default=1.0)
        on_b, on_a = [scale * number for number in numbers], [1.0] * len(numbers)
        return sum_of_factors(factors, on_b, on_a)
    numbers = task_weights(context, weights, default=1 / len(context.all_tasks))
    signed = [number * f.scaling for number, f in zip(numbers, factors, strict=True)]
    on_a = [(1 if value >= 0 else -1) * abs(value) ** 0.5 for value in signed]
    # b already holds the scaling once, so the raw B's sqrt|w s| is divided by it. A scaling of
    # zero (alpha 0) left nothing in b to divide.
    on_b = [
        scale * abs(value) ** 0.5 / (f.scaling or 1.0)
        for value, f in zip(signed, factors, strict=True)
    ]
    return sum_of_factors(factors, on_b, on_a)


def sum_of_factors(
    factors: Sequence[LoRAFactors], on_b: Sequence[float], on_a: Sequence[float]
) -> LoRAFactors:
    """Return factors `b = sum_k on_b[k] b_k`, `a = sum_k on_a[k] a_k`, ranks padded with zeros."""
    rank = max(f.rank for f in factors)
    b = _padded_sum([f.b * n for f, n in zip(factors, on_b, strict=True)], rank, dim=1)
    a = _padded_sum([f.a * n for f, n in zip(factors, on_a, strict=True)], rank, dim=0)
    return LoRAFactors(a, b)


def _padded_sum(tensors: Sequence[Tensor], rank: int, *, dim: int) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = rank
    total = torch.zeros(shape)
    for tensor in tensors:
        total.narrow(dim, 0, tensor.shape[dim]).add_(tensor)
    return total
