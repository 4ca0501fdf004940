"""Model soup: the average of the fine-tuned models."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from icm_ray.methods.linear import sum_of_factors
from icm_ray.methods.shared.parameters import Weights, task_weights
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.types import Delta, LoRAFactors, ModuleContext


def soup(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    weights: Weights = None,
    space: Annotated[
        Literal["delta", "factors"],
        Field(description="Average the deltas (exact) or A and B separately (cross terms)."),
    ] = "delta",
) -> LoRAFactors | Delta:
    """Average the deltas: `sum_k w_k delta_k` with `w_k = 1/K`.

    Paper: arXiv 2203.05482, uniform soup. All models share the base, so averaging models is
    averaging deltas. A task without this module counts as a zero delta, because its model is the
    base there. Differs: `space="factors"` averages A and B separately, as some code does; its
    product is `(1/K^2) sum_ij B_i A_j` and loses most of the signal.
    """
    numbers = task_weights(context, weights, default=1 / len(context.all_tasks))
    if space == "delta":
        return weighted_sum(factors, numbers)
    return sum_of_factors(list(factors), numbers, numbers)
