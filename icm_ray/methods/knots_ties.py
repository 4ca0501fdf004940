"""KnOTS-TIES: TIES on coordinates in a basis that all deltas of a module share."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from icm_ray.methods.shared.blocks import Density
from icm_ray.methods.shared.knots_basis import coordinate_blocks, knots
from icm_ray.methods.shared.parameters import Scale, Weights
from icm_ray.methods.shared.trim import trim_passes
from icm_ray.methods.shared.votes import AggregateChoice
from icm_ray.methods.table import Pass
from icm_ray.methods.ties import ties
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence

RULES = {"knots": "ties", "nsc": "nsc", "core": "core"}


def passes(*, density: float, preset: str, **_params: Any) -> tuple[Pass, ...]:
    """Return the passes over all modules; preset nsc looks at one module alone."""
    return trim_passes(coordinate_blocks, density) if preset == "knots" else ()


def knots_ties(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    density: Density = 0.2,
    scale: Scale = 1.0,
    weights: Weights = None,
    preset: Annotated[
        Literal["knots", "nsc", "core"],
        Field(description="Rules after the joint SVD: those of ties with its preset of that kind."),
    ] = "knots",
    aggregate: AggregateChoice = None,
) -> LoRAFactors:
    """Align the deltas by a joint SVD, then trim, elect and average: `scale * U TIES(P_1 .. P_K)`.

    `[delta_1 .. delta_K] = U [P_1 .. P_K]` with U the left singular vectors of all deltas side by
    side. The result is exactly the factors `b = U`, `a = scale * TIES(P_1 .. P_K)`.

    Paper: arXiv 2410.19735, with TIES of arXiv 2306.01708. Preset `knots` trims over the
    whole adapter, elects by the sum of values and takes the mean (method `ties`, preset `ties`);
    modules a task lacks count as zeros. Preset `nsc` (baseline of arXiv 2603.26317) trims each
    module, elects by the sum of signs, + where they cancel, and takes the sum. Preset `core` (the
    KnOTS space of arXiv 2509.17786) merges the right singular vectors alone, module by module, and
    multiplies the singular values back in afterwards.
    The papers tune `scale` and `density` on validation data: 0.6 and 0.2 for ViT-B/32, 0.5 and 1
    for Llama-3-8B.

    Differs: see `knots_basis` for the singular values that count as zero. With `nsc` the result
    depends on the signs of the singular vectors, which are arbitrary; here the largest entry of
    each is positive. Directions of equal singular values are arbitrary too, in all presets: the
    result is repeatable, but another basis of them would give another. Evidence `U` says which
    signs to take.

    Cost: O((d_out + d_in) R^2 + K d_in R r) and three to four sweeps over `K * R * d_in`
    coordinates, R the sum of ranks; the result has rank R.
    """
    space = knots(factors, evidence, context)
    if preset == "core":
        space = space.whitened()
    return space.merged_by(
        ties,
        context=context,
        density=density,
        scale=scale,
        weights=weights,
        preset=RULES[preset],
        aggregate=aggregate,
    )
