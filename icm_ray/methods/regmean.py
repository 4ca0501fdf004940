"""RegMean: the one linear layer that comes closest to all experts on their own inputs."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from icm_ray.errors import InputError
from icm_ray.methods.shared.grams import grams_of
from icm_ray.methods.shared.parameters import Scale
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.types import Delta, LoRAFactors, ModuleContext, ModuleEvidence


def regmean(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    rho: Annotated[
        float, Field(ge=0, le=1, description="Factor of the Grams' off-diagonal entries.")
    ] = 1.0,
    ridge: Annotated[
        float,
        Field(
            ge=0, allow_inf_nan=False, description="Added to Gram diagonals, over their mean entry."
        ),
    ] = 1e-2,
    scale: Scale = 1.0,
) -> LoRAFactors | Delta:
    """Solve the joint regression: `scale * (sum_k B_k A_k G_k)(sum_k G_k)^-1`.

    `G_k = X_k^T X_k / n_k` over the inputs of this module for task k, with off-diagonal entries
    times rho. The base cancels, so the regression of the whole weights is that of the deltas, and
    its solution is an exact LoRA: `B = [B_1 .. B_K]`, `A = [A_1 G_1; ..; A_K G_K] G^-1`.

    Paper: arXiv 2212.09849, closed form. Differs: published is rho 0.9, which takes a tenth of the
    off-diagonal entries, and no ridge; whole Grams with a ridge of a hundredth keep more
    (docs/experiments.md). The ridge is added to each G_k and so to both sides of the equation.
    Directions no input has, where the equation says nothing, get the average of the tasks, and one
    adapter alone is given back.

    Evidence: `gram.<task>`, or `gram_root.<task>` and `gram_diagonal.<task>`. A task without this
    module counts as a zero delta if its Gram is given, and is left out if not. A module without any
    Gram (an embedding has no input features) is averaged.

    Raises:
        InputError: Grams for some tasks of the module only, of another size, or singular.

    Cost: O(d_in^3 + R d_in^2); three `(d_in, d_in)` float64 matrices besides the Grams. Of Grams in
    D directions in all, O((D^2 + R D) d_in).
    """
    factors = list(factors)
    total, right = None, []
    by_task = dict(zip(context.tasks, factors, strict=True))
    for task, gram in grams_of(factors[0].shape[1], context, evidence or {}).items():
        gram = gram.damped(rho, ridge)
        total = gram if total is None else total + gram
        if task in by_task:
            right.append(gram.left(by_task[task].a))
    if total is None or not total.energies().any():
        return weighted_sum(factors, [scale / len(context.all_tasks)] * len(factors))
    a = total.solved(torch.cat(right))
    if a is None:
        raise InputError(
            f"{context.module}: the Gram matrices of all tasks add up to a singular matrix. "
            "Set params.ridge above 0, or gather more inputs."
        )
    return LoRAFactors(a.float().contiguous(), torch.cat([f.b for f in factors], 1) * scale)
