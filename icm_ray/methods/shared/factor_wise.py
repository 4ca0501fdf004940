"""PEFT's element-wise merges of the factors: A and B each on their own."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.linalg.sparsify import largest
from icm_ray.methods.shared.blocks import dropped
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence

Side = Literal["a", "b"]


def factor_wise(
    factors: Sequence[LoRAFactors],
    context: ModuleContext,
    weights: Sequence[float],
    scale: float,
    merge: Callable[[Tensor, Tensor, Side], Tensor],
) -> LoRAFactors:
    """Merge all A and all raw B as PEFT does; the product holds every `B_i A_j`.

    With s_k the adapter's scaling, A_k enters with weight `sign(w_k s_k) sqrt|w_k s_k|` and B_k
    with `sqrt|w_k s_k|`, as in `linear`.

    Args:
        factors: One per present task, of equal ranks.
        context: Names the module in the error.
        weights: One per entry of `factors`.
        scale: Multiplies B.
        merge: `(values, weights, side)` with values `(tasks, rank, d_in)` of side "a" or
            `(tasks, d_out, rank)` of side "b", and weights `(tasks,)`.

    Raises:
        InputError: the ranks differ.
    """
    factors = list(factors)
    ranks = [f.rank for f in factors]
    if len(set(ranks)) > 1:
        raise InputError(
            f"module {context.module}: ranks {ranks} but equal ranks are expected, because this "
            "preset merges A and B separately. Choose a preset on deltas."
        )
    signed = [weight * f.scaling for weight, f in zip(weights, factors, strict=True)]
    on_b = torch.tensor([abs(number) ** 0.5 for number in signed])
    on_a = torch.tensor([1.0 if number >= 0 else -1.0 for number in signed]) * on_b
    a = merge(torch.stack([f.a for f in factors]), on_a, "a")
    # A scaling of zero (alpha 0) left nothing in b to divide.
    b = merge(torch.stack([f.b / (f.scaling or 1.0) for f in factors]), on_b, "b")
    return LoRAFactors(a, b * scale)


def largest_of_each(values: Tensor, density: float) -> Tensor:
    """Return each task's `int(density * n)` entries of largest magnitude, the others 0."""
    count = int(density * values[0].numel())
    return torch.stack([torch.where(largest(v, count), v, 0.0) for v in values])


def dropped_of_each(
    values: Tensor,
    side: Side,
    context: ModuleContext,
    density: float,
    evidence: ModuleEvidence | None,
) -> Tensor:
    """Return one side's factors after DARE, in place; masks are `mask_a.<task>` or `mask_b`."""
    shape = (values.shape[1], values.shape[2])
    return next(dropped(iter((values,)), context, shape, density, evidence, f"mask_{side}"))
