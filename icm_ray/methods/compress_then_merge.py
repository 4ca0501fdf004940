"""Compress, then merge: bases of the wanted rank that all tasks share, and a merge between them."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from icm_ray.linalg import lowrank
from icm_ray.linalg.shared_basis import basis_of
from icm_ray.linalg.tucker import shared_bases
from icm_ray.methods.shared.cores import between, merged_entries
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence

USUAL_ROUNDS = 40
"""Of the fit: 12 to 47 a module with published adapters; unrelated ones go on to the last."""
ROUND_FLOPS, CUBE_FLOPS = 7e6, 20.0
"""What a round costs, in flops of a plan, and what more by the cube of the sum of ranks; measured
on sums of 32 to 96."""


def fit_flops(total: int) -> float:
    """Return what fitting the bases of one module usually costs."""
    return USUAL_ROUNDS * (ROUND_FLOPS + CUBE_FLOPS * total**3)


def compress_then_merge(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    rank: Annotated[
        int | None,
        Field(ge=1, description="Of the shared bases and the result; None: the largest input's."),
    ] = None,
    inner: Annotated[
        Literal["ties", "task_arithmetic", "dare_ties", "iso_c"],
        Field(description="What merges the cores: a method of this name."),
    ] = "ties",
    density: Annotated[
        float,
        Field(gt=0, le=1, description="Share of entries that ties trims to, or that DARE keeps."),
    ] = 0.25,
    trim_density: Annotated[
        float, Field(gt=0, le=1, description="Share that dare_ties trims to besides.")
    ] = 1.0,
    by_norm: Annotated[
        float,
        Field(ge=0, le=1, description="How deltas count for the bases: 0 alike, 1 by their norm."),
    ] = 0.25,
    scale: Scale = 0.75,
    weights: Weights = None,
) -> LoRAFactors:
    """Merge `rank x rank` cores: `scale * U inner(U^T delta_1 V .. U^T delta_K V) V^T`.

    U and V, orthonormal, keep as much as they can of all deltas at once (Tucker-2, by alternating
    singular vectors), each rescaled to `by_norm` of its own norm and the rest of the mean norm.
    `weights`, ones unless given, multiply the cores. Where other methods are cut afterwards, here
    nothing is lost after the merge.

    Paper: arXiv 2606.03723. Differs: the reference stops fitting at a change of 1e-6 in float32,
    which leaves bases off by .1 to .4 % and flips entries of ties; here they are fitted until no
    more than 1e-14 is gained. It ignores the adapters' scaling, here part of B. ties depends on
    the bases, so it trims along singular vectors, as there.

    Evidence `mask.<task>` replaces the draws of dare_ties: one entry a core's entry, rows and
    columns by descending singular value.

    Cost: O(R^2 (d_out + d_in)) and some dozens of rounds of O(R^3).
    """
    factors = list(factors)
    left = basis_of(torch.cat([f.b for f in factors], dim=1))
    right = basis_of(torch.cat([f.a for f in factors]).T)
    numbers = task_weights(context, weights, default=1.0)
    sides = (side.coordinates.split([f.rank for f in factors], dim=1) for side in (left, right))
    deltas = torch.stack([b @ a.T for b, a in zip(*sides, strict=True)])
    norms = deltas.flatten(1).norm(dim=1)
    if not norms.any():
        return LoRAFactors.none(factors[0].shape)
    wanted = by_norm * norms + (1 - by_norm) * norms[norms > 0].mean()
    factor = torch.where(norms > 0, wanted / norms, 0)[:, None, None]
    largest = int(torch.linalg.matrix_rank(deltas, rtol=lowrank.NUMERICAL_RANK).max())
    u, v = shared_bases(factor * deltas, rank or largest)
    cores = torch.tensor(numbers)[:, None, None] * (u.T @ deltas @ v).float()
    merged = merged_entries(inner, cores, context, evidence, (density, trim_density))
    core = u @ merged.double() @ v.T
    return between(left, core, right, scale=scale, equal=inner == "iso_c")
