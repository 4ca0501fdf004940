"""Core Space: merge in the small space that all adapters of a module span together."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from icm_ray.linalg import lowrank
from icm_ray.linalg.orthogonal import polar
from icm_ray.linalg.shared_basis import Basis, basis_of
from icm_ray.methods.iso_cts import iso_cts
from icm_ray.methods.shared.cores import between, merged_entries
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights
from icm_ray.methods.tsv import shares
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence


def core_space(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    inner: Annotated[
        Literal["ties", "task_arithmetic", "dare", "dare_ties", "tsv", "iso_c", "iso_cts", "cart"],
        Field(description="What merges the cores: a method of this name, or cart."),
    ] = "ties",
    density: Annotated[
        float,
        Field(gt=0, le=1, description="Share of entries that ties trims to, or that DARE keeps."),
    ] = 1.0,
    trim_density: Annotated[
        float, Field(gt=0, le=1, description="Share that dare_ties trims to besides.")
    ] = 1.0,
    scale: Scale = 1.0,
    weights: Weights = None,
    isotropize: Annotated[
        bool, Field(description="Make all singular values of the merged core equal.")
    ] = False,
    balance: Annotated[
        bool, Field(description="Split each delta evenly into factors before the bases are made.")
    ] = False,
    cart_rank: Annotated[
        float, Field(gt=0, le=1, description="Share of its directions that cart keeps of a task.")
    ] = 0.04,
    cart_scale: Annotated[
        float,
        Field(allow_inf_nan=False, description="Multiplies what cart adds to the mean."),
    ] = 1.0,
) -> LoRAFactors:
    """Merge small cores: `scale * U inner(M_1 .. M_K) V` with `M_k = U^T delta_k V^T`.

    U are the left singular vectors of `[B_1 .. B_K]`, V the right ones of `[A_1; ..; A_K]`, so
    that `delta_k = U M_k V` exactly. `weights`, ones unless given, multiply the cores.

    Paper: arXiv 2509.17786. ties and dare trim, elect and drop in each module's cores
    and not over the whole adapter, as the reference does; so does cart (arXiv 2412.12153):
    `mean + cart_scale * sum_k` of `M_k - mean` cut to `ceil(cart_rank * n)` directions of n.

    The bases come from the factors, so what looks at single entries (ties, dare) depends on how a
    delta is split into B and A. `balance` splits it evenly first, which ends that; it is not in
    the paper. Differs: the reference ignores the adapters' scaling, here it is part of B;
    directions of no strength are left out of the bases, so no threshold and no mean counts them;
    tsv takes the directions that method `tsv` takes, where the reference takes `n / K` of each and
    so cuts adapters of larger rank and gives those of smaller rank arbitrary directions.

    Evidence `mask.<task>` replaces the draws of dare and dare_ties: one entry a core's entry, rows
    and columns by descending singular value of the stacks.

    Cost: O((d_out + d_in) R^2 + K R^3), R the sum of ranks; the result has at most rank R.
    """
    pairs = [(f.b, f.a) for f in factors]
    if balance:
        pairs = [lowrank.svd(b, a).factors(a.shape[0]) for b, a in pairs]
    left = basis_of(torch.cat([b for b, _ in pairs], dim=1))
    right = basis_of(torch.cat([a for _, a in pairs]).T)
    if not (left.s.numel() and right.s.numel()):
        return LoRAFactors.none((pairs[0][0].shape[0], pairs[0][1].shape[1]))
    numbers = task_weights(context, weights, default=1.0)
    cores = _cores(left, right, [a.shape[0] for _, a in pairs], numbers)
    if inner == "cart":
        merged = _cart(cores, len(context.all_tasks), cart_rank, cart_scale)
    elif inner == "tsv":
        merged = _tsv(cores, min(pairs[0][0].shape[0], pairs[0][1].shape[1]))
    elif inner == "iso_cts":
        merged = iso_cts(cores, context=context).delta()
    else:
        values = torch.stack([core.delta() for core in cores])
        merged = merged_entries(inner, values, context, evidence, (density, trim_density))
    return between(left, merged, right, scale=scale, equal=isotropize or inner == "iso_c")


def _cores(
    left: Basis, right: Basis, ranks: Sequence[int], weights: Sequence[float]
) -> list[LoRAFactors]:
    """Return `weights[k] * U^T delta_k V^T` of each task, as the factors they come in."""
    sides = (side.coordinates.split(list(ranks), dim=1) for side in (left, right))
    return [
        LoRAFactors(a.T.float(), (weight * b).float())
        for b, a, weight in zip(*sides, weights, strict=True)
    ]


def _tsv(cores: Sequence[LoRAFactors], shorter_side: int) -> Float[Tensor, "p q"]:
    spectra = [lowrank.svd(core.b, core.a) for core in cores]
    ranks = shares([one.s.numel() for one in spectra], shorter_side, None)
    parts = list(zip(spectra, ranks, strict=True))
    u = polar(torch.cat([one.u[:, :rank] for one, rank in parts], dim=1))
    v = polar(torch.cat([one.vh[:rank].T for one, rank in parts], dim=1))
    return (u * torch.cat([one.s[:rank] for one, rank in parts])) @ v.T


def _cart(
    cores: Sequence[LoRAFactors], tasks: int, rank: float, scale: float
) -> Float[Tensor, "p q"]:
    present = torch.stack([core.b.double() @ core.a.double() for core in cores])
    mean = present.sum(0) / tasks
    absent = (-mean).expand(tasks - len(cores), -1, -1)  # a task without the module, centred
    u, s, vh = torch.linalg.svd(torch.cat([present - mean, absent]), full_matrices=False)
    kept = math.ceil(rank * s.shape[1])
    tops = u[:, :, :kept] * s[:, None, :kept] @ vh[:, :kept]
    return mean + scale * tops.sum(0)
