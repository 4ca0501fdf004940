"""SVD merging: the weighted sum cut to a small rank."""

from collections.abc import Sequence

from icm_ray.methods.shared.parameters import Weights, task_weights
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.types import Delta, LoRAFactors, ModuleContext


def svd(
    factors: Sequence[LoRAFactors], *, context: ModuleContext, weights: Weights = None
) -> LoRAFactors | Delta:
    """Sum the deltas and keep the largest singular values: `SVD_q(sum_k w_k delta_k)`.

    The same delta as PEFT's `combination_type="svd"`, with `w_k = 1/K`. The cut itself is the
    merge's last step: `output_rank` sets q, which defaults to the largest input rank. It is the
    best approximation of that rank (Eckart-Young), found from a core of size sum of ranks.
    """
    return weighted_sum(factors, task_weights(context, weights, default=1 / len(context.all_tasks)))
