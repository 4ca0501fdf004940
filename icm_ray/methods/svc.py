"""SVC: directions of the sum that several tasks count twice are shrunk to what they are alone."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from icm_ray.linalg import lowrank
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights, usual
from icm_ray.types import LoRAFactors, ModuleContext

LEAST = 1e-12
"""Of a squared length that is divided by, as in the reference."""


def svc(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    alpha: Annotated[
        float,
        usual("loguniform(0.05, 1)"),
        Field(gt=0, le=1e3, description="Least share; what shares less is amplified up to K / it."),
    ] = 0.1,
    weights: Weights = None,
    scale: Scale = 1.0,
) -> LoRAFactors:
    """Calibrate the singular values of `D = sum_k w_k delta_k`: `scale * U diag(gamma s) V^T`.

    `gamma_r = K / sum_k max(alpha, <u_r^T D, u_r^T delta_k> / |u_r^T delta_k|^2)`, u_r the left
    singular vectors of D. A direction that every task sees K times as long in the sum as it is
    alone is divided by K; one that the sum keeps as it is stays.

    Paper: arXiv 2602.05536, alpha .1 after task arithmetic with .3 (`weights`, all alike). Differs:
    `scale` comes after the calibration, which itself all but undoes one before it: for a small
    alpha weights that are all alike change nothing.

    Cost: O(R^2 (d_out + d_in) + K R^3).
    """
    factors = list(factors)
    pairs = [(f.b, f.a) for f in factors]
    whole = lowrank.svd(*lowrank.stack(pairs, task_weights(context, weights, default=1.0)))
    count = len(whole.s)
    absent = len(context.all_tasks) - len(factors)
    shares = torch.full((count,), absent * alpha, dtype=torch.float64)
    for b, a in pairs:
        left = whole.left_core.T @ lowrank.gram(whole.left, b)
        right = lowrank.gram(a.T, whole.right.T) @ whole.right_core.T
        alike = whole.s * (left * right.T).sum(1)
        own = ((left @ lowrank.gram(a.T, a.T)) * left).sum(1)
        shares += (alike / own.clamp(min=LEAST)).clamp(min=alpha)
    b, a = whole.factors(count)
    return LoRAFactors(a, b * (scale * len(context.all_tasks) / shares).float())
