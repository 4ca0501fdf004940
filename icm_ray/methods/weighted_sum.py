"""The exact weighted sum of deltas that six methods share."""

from collections.abc import Sequence

from icm_ray.linalg.lowrank import stack
from icm_ray.types import LoRAFactors


def weighted_sum(factors: Sequence[LoRAFactors], weights: Sequence[float]) -> LoRAFactors:
    """Return factors of `sum_k weights[k] * delta_k`, exactly, by stacking.

    Args:
        factors: One per task present in the module; equal `d_out` and `d_in`, any ranks.
        weights: One per entry of `factors`, any sign.

    Returns:
        Factors of rank `sum_k rank_k` (tasks of weight zero left out), float32.
    """
    b, a = stack([(f.b, f.a) for f in factors], weights)
    return LoRAFactors(a, b)
