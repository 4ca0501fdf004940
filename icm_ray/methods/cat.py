"""Concatenation: the exact weighted sum as one adapter of the summed rank."""

from collections.abc import Sequence

from icm_ray.methods.shared.parameters import Weights, task_weights
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.types import Delta, LoRAFactors, ModuleContext


def cat(
    factors: Sequence[LoRAFactors], *, context: ModuleContext, weights: Weights = None
) -> LoRAFactors | Delta:
    """Concatenate the factors: `A = [A_1; ..; A_K]`, `B = [w_1 B_1, .., w_K B_K]`, `w_k = 1/K`.

    The same delta as PEFT's `add_weighted_adapter(combination_type="cat")`, rank `sum_k r_k`.
    Differs: PEFT 0.21 leaves rsLoRA on in the result, which makes it sqrt(rank) too large.
    """
    return weighted_sum(factors, task_weights(context, weights, default=1 / len(context.all_tasks)))
