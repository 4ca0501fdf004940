"""KnOTS-DARE-TIES: DARE and TIES on coordinates in a basis that all deltas of a module share."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from icm_ray.methods.dare_ties import dare_ties
from icm_ray.methods.shared.blocks import Density, dropped
from icm_ray.methods.shared.knots_basis import knots
from icm_ray.methods.shared.parameters import Scale, Weights
from icm_ray.methods.shared.trim import trim_passes
from icm_ray.methods.shared.votes import AggregateChoice
from icm_ray.methods.table import Pass
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence

RULES = {"knots": "dare_ties", "nsc": "nsc"}


def passes(*, trim_density: float, preset: str, **_params: Any) -> tuple[Pass, ...]:
    """Return the passes over all modules; preset nsc looks at one module alone."""
    return trim_passes(_dropped, trim_density) if preset == "knots" else ()


def knots_dare_ties(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    density: Density = 0.9,
    trim_density: Annotated[
        float, Field(gt=0, le=1, description="Share of entries TIES trims to besides, in (0, 1].")
    ] = 1.0,
    scale: Scale = 1.0,
    weights: Weights = None,
    preset: Annotated[
        Literal["knots", "nsc"],
        Field(description="knots: DARE, then TIES; nsc: trim, then DARE, then the rest of TIES."),
    ] = "knots",
    aggregate: AggregateChoice = None,
) -> LoRAFactors:
    """Align the deltas by a joint SVD, drop entries by chance, elect signs, put together.

    `scale * U DARE-TIES(P_1 .. P_K)` with U and the coordinates P_k of `knots_ties`; the presets
    are those of `dare_ties` (`knots`: its own; `nsc`: its nsc) on the coordinates.

    Paper: arXiv 2410.19735, with DARE of arXiv 2311.03099. `density` is the share DARE keeps, the
    paper's 1 - p. It tunes that and `scale` on validation data: 0.9 and 0.7 for ViT-B/32, 0.2 and
    0.4 for Llama-3-8B, and trims nothing. Differs: as `knots_ties` does; draws are keyed by seed,
    task and module.

    Evidence `mask.<task>` replaces the draws: one entry a coordinate, rows by descending singular
    value. Evidence `U` says which signs the singular vectors have.

    Cost: as `knots_ties`.
    """
    return knots(factors, evidence, context).merged_by(
        dare_ties,
        context=context,
        evidence=_masks(evidence),
        density=density,
        trim_density=trim_density,
        scale=scale,
        weights=weights,
        preset=RULES[preset],
        aggregate=aggregate,
    )


def _masks(evidence: ModuleEvidence | None) -> ModuleEvidence:
    return {name: tensor for name, tensor in (evidence or {}).items() if name != "U"}


def _dropped(
    factors: Sequence[LoRAFactors],
    context: ModuleContext,
    evidence: ModuleEvidence | None,
    *,
    density: float,
    **_params: Any,
) -> Iterator[Tensor]:
    space = knots(factors, evidence, context)
    shape = space.coordinates[0].shape
    return dropped(space.blocks(), context, shape, density, _masks(evidence))
