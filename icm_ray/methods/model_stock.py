"""Model Stock: the average drawn back to the base, the more so the less the deltas agree."""

from collections.abc import Sequence
from typing import Annotated

from icm_ray.linalg.gram import inner_products
from icm_ray.methods.shared.parameters import Scale, usual
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.types import Delta, LoRAFactors, ModuleContext


def model_stock(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    scale: Annotated[Scale, usual("loguniform(0.5, 6)")] = 1.0,
) -> LoRAFactors | Delta:
    """Average and shrink: `scale * t * (1/K) sum_k delta_k`, `t = n c / (1 + (n - 1) c)`.

    c is the mean cosine between the deltas of this module. With each delta a common part plus
    noise of its own, t is the share of the average's squared length that is the common part.

    Paper: arXiv 2403.19522, interpolation ratio of N models, one t a layer. Differs: a delta that
    is zero, or absent, has no direction, so c and n are those of the n other tasks, while the
    average still divides by all K; one such task alone keeps t = 1. A negative c, for which the
    formula turns the average around or has a pole, counts as 0: t is in [0, 1], 0 is the base.

    Cost: O(R^2 (d_out + d_in)) with R the sum of ranks.
    """
    factors = list(factors)
    gram = inner_products([(f.b, f.a) for f in factors])
    lengths = gram.diagonal().clamp(min=0).sqrt()
    directions = lengths > 0
    n = int(directions.sum())
    share = 1.0
    if n > 1:
        cosines = (gram / lengths / lengths[:, None])[directions][:, directions]
        cosine = max(float(cosines.sum() - n) / (n * (n - 1)), 0.0)
        share = n * cosine / (1 + (n - 1) * cosine)
    return weighted_sum(factors, [scale * share / len(context.all_tasks)] * len(factors))
