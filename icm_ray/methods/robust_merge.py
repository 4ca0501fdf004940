"""RobustMerge: pruned factors, added up with weak directions strengthened."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from icm_ray.methods.linear import sum_of_factors
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights, usual
from icm_ray.types import LoRAFactors, ModuleContext


def robust_merge(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    density: Annotated[
        float, Field(ge=0, le=1, description="Share of the entries of A and of B that is kept.")
    ] = 0.2,
    attention_ratio: Annotated[
        float,
        Field(ge=0, le=1, description="Share of a task's ranks that the other ones are raised to."),
    ] = 0.2,
    weights: Weights = None,
    scale: Annotated[Scale, usual("loguniform(0.05, 2)")] = 1.0,
    preset: Annotated[
        Literal["robust", "raw"],
        Field(description="robust: an adapter's scaling goes half to A, half to B; raw: ignored."),
    ] = "robust",
) -> LoRAFactors:
    """Prune, compensate and add: `scale * (sum_k w_k S_k B_k / sum_k S_k)(sum_k w_k A_k)`.

    A_k and B_k keep their entries of largest magnitude; `S_k` is diagonal, for each rank what
    pruning took from its row of A (sum of magnitudes before over after), the small ones raised to
    the largest `attention_ratio`. `w_k = 2` unless `weights` says otherwise, on both factors.

    Paper: arXiv 2502.17159 and the code beside it, which keeps the 20 % that the paper's wording
    could also mean to drop. Differs: the code ignores alpha / r (preset `raw`); here sqrt(s_k)
    multiplies A and B alike. The code divides by zero where a row of A is pruned whole; such a rank
    has nothing left to add and takes no part in S, nor do the zeros that pad smaller ranks.

    The product holds every `B_i A_j`, and single entries are pruned, so the result depends on how a
    delta is split into B and A.
    """
    numbers = task_weights(context, weights, default=2.0)
    factors = list(factors)
    rank = max(f.rank for f in factors)
    pruned, strengths = [], []
    for f in factors:
        # b already holds the scaling once. A scaling of zero (alpha 0) left nothing in b to divide.
        root = abs(f.scaling) ** 0.5 or 1.0
        a, b = (f.a * root, f.b / root) if preset == "robust" else (f.a, f.b / (f.scaling or 1.0))
        kept = _largest(a, density)
        strength = _strength(a, kept, attention_ratio)
        pruned.append(LoRAFactors(kept, _largest(b, density) * strength))
        strengths.append(torch.nn.functional.pad(strength, (0, rank - f.rank)))
    total = sum_of_factors(pruned, numbers, numbers)
    shared = torch.stack(strengths).sum(0)
    return LoRAFactors(total.a, total.b * torch.where(shared > 0, scale / shared, 0.0))


def _largest(matrix: Float[Tensor, "m n"], density: float) -> Float[Tensor, "m n"]:
    """Return the matrix with its largest entries only, of those equal to the last one all."""
    dropped = int(matrix.numel() * (1 - density))
    if dropped == 0:
        return matrix
    last = matrix.abs().flatten().kthvalue(dropped).values
    return torch.where(matrix.abs() >= last, matrix, 0.0)


def _strength(
    a: Float[Tensor, "rank d_in"], kept: Float[Tensor, "rank d_in"], attention_ratio: float
) -> Float[Tensor, " rank"]:
    """Return what pruning took from each row, small ones raised; 0 where it left nothing."""
    rest = kept.abs().sum(1)
    ratio = torch.where(rest > 0, a.abs().sum(1) / rest, 0.0)
    alive = ratio[ratio > 0].sort().values
    if len(alive) == 0:
        return ratio
    floor = alive[min(int(len(alive) * (1 - attention_ratio)), len(alive) - 1)]
    return torch.where(ratio > 0, ratio.clamp(min=floor), 0.0)
