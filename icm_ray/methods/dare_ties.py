"""DARE-TIES: drop entries by chance, elect signs, put together the entries that agree."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from icm_ray.errors import RecipeError
from icm_ray.linalg.consensus import vote
from icm_ray.methods.shared.blocks import Density, deltas, dropped
from icm_ray.methods.shared.factor_wise import Side, dropped_of_each, factor_wise
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights, usual
from icm_ray.methods.shared.trim import exactly, majority_sign, thresholds, trim_passes
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
from icm_ray.types import Delta, LoRAFactors, ModuleContext, ModuleEvidence

RULES = {
    "dare_ties": PAPER,
    "nsc": NSC,
    "peft": PEFT,
    "peft_svd": PEFT,
    "mergekit": replace(MERGEKIT, aggregate="sum"),
}
TRIMS = ("dare_ties", "nsc")


def passes(*, trim_density: float, preset: str, **_params: Any) -> tuple[Pass, ...]:
    """Return the passes over all modules; only the original's election looks beyond one."""
    return trim_passes(_dropped, trim_density, by_rows=True) if preset == "dare_ties" else ()


def dare_ties(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    density: Annotated[Density, usual("uniform(0.1, 1)")] = 0.1,  # fewer: louder noise
    trim_density: Annotated[
        float,
        Field(gt=0, le=1, description="Share TIES trims to besides; presets dare_ties and nsc."),
    ] = 1.0,
    scale: Scale = 1.0,
    weights: Weights = None,
    preset: Annotated[
        Literal["dare_ties", "nsc", "peft", "peft_svd", "mergekit"],
        Field(description="Whose rules; the docstring says how each drops, elects and averages."),
    ] = "dare_ties",
    aggregate: AggregateChoice = None,
    election: ElectionChoice = None,
) -> LoRAFactors | Delta:
    """Drop entries by chance, elect a sign an entry, put together the entries that agree.

    Paper: arXiv 2311.03099, Eq. 2, in place of (or besides) the trim of TIES, arXiv 2306.01708.

        preset     drops and trims                    elects and puts together as in `ties`
        dare_ties  DARE, then a trim of the adapter   preset ties
        nsc        a trim of the module, then DARE    preset nsc
        peft_svd   DARE                               preset peft_svd
        peft       DARE on A and on B apart           preset peft
        mergekit   DARE                               preset mergekit, but the sum

    Kept entries are multiplied by 1 / density. Differs: newer mergekit restores the L1 norm.
    Draws and evidence are those of `dare`.
    """
    if trim_density < 1 and preset not in TRIMS:
        raise RecipeError(f"params.trim_density: preset {preset!r} trims nothing. Leave it at 1.")
    numbers = task_weights(context, weights, default=1.0)
    if preset == "peft":

        def one(values: Tensor, numbers: Tensor, side: Side) -> Tensor:
            how = PEFT.vote(numbers.tolist(), 1.0, aggregate, 1, election)
            kept = dropped_of_each(values, side, context, density, evidence)
            return vote(kept, torch.zeros(len(values)), how)

        return factor_wise(factors, context, numbers, scale, one)
    factors, rules = list(factors), RULES[preset]
    if preset == "nsc":
        trim = exactly(partial(deltas, factors), len(factors), partial(rules.count, trim_density))

        def blocks() -> Iterator[Tensor]:
            kept = trim.of(deltas(factors))
            return dropped(kept, context, factors[0].shape, density, evidence)
    else:
        blocks = partial(_dropped, factors, context, evidence, density=density)
    zero = majority_sign(context) if preset == "dare_ties" else 1
    how = rules.vote(numbers, scale, aggregate, zero, election)
    return voted(blocks, factors[0].shape, thresholds(context), how)


def _dropped(
    factors: Sequence[LoRAFactors],
    context: ModuleContext,
    evidence: ModuleEvidence | None,
    *,
    density: float,
    **_params: Any,
) -> Iterator[Tensor]:
    return dropped(deltas(factors), context, factors[0].shape, density, evidence)
