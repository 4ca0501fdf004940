"""Task arithmetic: one scale times the sum of the deltas."""

from collections.abc import Sequence
from typing import Any

from icm_ray.methods.shared.parameters import Scale, Weights, task_weights
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.types import Delta, LoRAFactors, ModuleContext


def task_arithmetic(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    scale: Scale = 1.0,
    weights: Weights = None,
) -> LoRAFactors | Delta:
    """Add the deltas up: `scale * sum_k w_k delta_k` with `w_k = 1`.

    Paper: arXiv 2212.04089, section 2. The sum convention; a scale of 0.3 to 0.5 is usual for six
    to eight tasks, 1/K equals `soup`. Choose it on validation data, never on test data.
    """
    numbers = task_weights(context, weights, default=1.0)
    return weighted_sum(factors, [scale * number for number in numbers])


def warns(count: int, *, scale: float, **_params: Any) -> str | None:
    """Warn of a plain sum of many deltas."""
    if count > 2 and scale == 1:
        return f"scale 1 adds {count} deltas up; 0.3 to 0.5 is usual, 1/K is their average."
    return None
