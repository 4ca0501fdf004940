"""TIES: trim, elect signs, put together the entries that agree."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from icm_ray.linalg.consensus import Aggregate, Election, vote
from icm_ray.methods.shared.blocks import Density, deltas
from icm_ray.methods.shared.factor_wise import Side, factor_wise, largest_of_each
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights
from icm_ray.methods.shared.trim import (
    exactly,
    majority_sign,
    of_module_alone,
    thresholds,
    trim_passes,
)
from icm_ray.methods.shared.votes import (
    MERGEKIT,
    NSC,
    PAPER,
    PEFT,
    AggregateChoice,
    ElectionChoice,
    voted,
)
from icm_ray.methods.table import Pass
from icm_ray.types import Delta, LoRAFactors, ModuleContext

RULES = {"ties": PAPER, "core": PAPER, "nsc": NSC, "peft_svd": PEFT, "mergekit": MERGEKIT}


def passes(*, density: float, preset: str, **_params: Any) -> tuple[Pass, ...]:
    """Return the passes over all modules; only the original's trim looks beyond one."""
    return trim_passes(deltas, density, by_rows=True) if preset == "ties" else ()


def ties(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    density: Density = 0.2,
    scale: Scale = 1.0,
    weights: Weights = None,
    preset: Annotated[
        Literal["ties", "core", "nsc", "peft", "peft_svd", "mergekit"],
        Field(description="Whose rules; the docstring says how each trims, elects and averages."),
    ] = "ties",
    aggregate: AggregateChoice = None,
    election: ElectionChoice = None,
) -> LoRAFactors | Delta:
    """Trim each delta to its largest entries, elect a sign an entry, average those that agree.

    Paper: arXiv 2306.01708, section 4: `scale / n_p * sum_k w_k d_k[p]` over the n_p tasks whose
    trimmed `d_k[p]` has the sign of `sum_k w_k d_k[p]`.

        preset    trim to density        sign elected by        where it cancels   then
        ties      whole adapter, >=      sum of values          global majority    mean
        core      module, >=             sum of values          module's majority  mean
        nsc       module, exact, round   sum of signs           +                  sum
        peft_svd  module, exact, int     sum, unweighted        +                  mean of w_k d_k
        peft      A and B apart, exact   sum, unweighted        +                  mean of w_k A_k
        mergekit  module, exact, int     sum of values          +                  / sum of w_k

    ">=" keeps all entries equal to the last one, "exact" the first of them. With `density` 1 signs
    are still elected. Weights are 1 unless given. Differs: of equal entries the references that
    count exactly keep any.

    Cost: three to four sweeps over `tasks * d_out * d_in` entries that are never held.
    """
    numbers = task_weights(context, weights, default=1.0)
    if preset == "peft":
        one = partial(_one_factor, density, aggregate, election)
        return factor_wise(factors, context, numbers, scale, one)
    factors = list(factors)
    if preset == "core":
        trimming = trim_passes(deltas, density, by_rows=True)
        context = of_module_alone(trimming, factors, context, weights=weights, election=election)
    blocks, shape = partial(deltas, factors), factors[0].shape
    if preset in ("ties", "core"):
        how = RULES[preset].vote(numbers, scale, aggregate, majority_sign(context), election)
        return voted(blocks, shape, thresholds(context), how)
    rules = RULES[preset]
    trim = exactly(blocks, len(factors), partial(rules.count, density))
    how = rules.vote(numbers, scale, aggregate, 1, election)
    return voted(lambda: trim.without_surplus(blocks()), shape, trim.least, how)


def _one_factor(
    density: float,
    aggregate: Aggregate | None,
    election: Election | None,
    values: Tensor,
    weights: Tensor,
    _side: Side,
) -> Tensor:
    how = PEFT.vote(weights.tolist(), 1.0, aggregate, 1, election)
    return vote(largest_of_each(values, density), torch.zeros(len(values)), how)
