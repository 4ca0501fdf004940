"""WUDI in closed form: the joint regression with each delta's own Gram in place of its inputs'."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from icm_ray.linalg import lowrank
from icm_ray.linalg.shared_basis import basis_of
from icm_ray.methods.shared.parameters import Scale, usual
from icm_ray.types import LoRAFactors, ModuleContext


def wudi(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    ridge: Annotated[
        float,
        usual("loguniform(0.01, 1)"),
        Field(
            ge=1e-9,
            allow_inf_nan=False,
            description="Added to Gram diagonals, over their trace spread on all ranks.",
        ),
    ] = 0.1,
    scale: Scale = 1.0,
) -> LoRAFactors:
    """Solve the regression that the adapters pose themselves: `scale * (sum delta_k G_k) G^-1`.

    `G_k = delta_k^T delta_k / |delta_k|^2 + ridge / R`, G their sum over all tasks, R the sum of
    the deltas' ranks: inputs are guessed to be like the rows of the deltas. Without a ridge it is
    the minimum of `sum_k |(D - delta_k) delta_k^T|^2 / |delta_k|^2`, which gives every delta back
    where row spaces are independent; a large ridge gives the average. An exact LoRA:
    `B = [B_1 .. B_K]`, and no more than R directions of the inputs are ever looked at.

    Paper: arXiv 2503.08099; arXiv 2603.02945 solves such a system too. Differs: the first
    runs 300 steps of Adam at 1e-5 from the sum, on whole matrices. These move an entry by 3e-3 at
    most, so what comes out depends on the deltas' absolute size, and they leave the span of the
    adapters; what they approach inside of it is this. The ridge is ours. Adapters that share an
    initialisation nearly share their row spaces: a small ridge then makes the result large.

    Cost: O(R^2 (d_out + d_in) + K R^3).
    """
    factors = list(factors)
    rows = basis_of(torch.cat([f.a for f in factors]).T)
    seen = rows.coordinates.split([f.rank for f in factors], dim=1)
    grams, rank = [], 0
    for f, own in zip(factors, seen, strict=True):
        gram = own @ lowrank.gram(f.b, f.b) @ own.T
        trace = float(gram.trace())
        grams.append(gram / trace if trace > 0 else gram)
        rank += lowrank.svd(f.b, f.a).s.numel()
    added = ridge / max(rank, 1) * torch.eye(len(rows.s), dtype=torch.float64)
    total = sum(grams, len(context.all_tasks) * added)
    right = torch.cat([own.T @ (g + added) for own, g in zip(seen, grams, strict=True)])
    solved = torch.cholesky_solve(right.T, torch.linalg.cholesky(total))
    b = torch.cat([f.b for f in factors], 1) * scale
    return LoRAFactors(rows.product(solved).T.contiguous(), b)
