"""LoRA-LEGO: rank-one units of all adapters, clustered; one rank for each cluster."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.linalg.clusters import averages, lloyd, spread_out
from icm_ray.methods.shared.parameters import Scale, usual
from icm_ray.seeding import generator
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence

Preset = Literal["lego", "nsc"]


def lora_lego(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    rank: Annotated[
        int | None,
        Field(ge=1, description="Clusters, the rank of the result; None: the largest input rank."),
    ] = None,
    preset: Annotated[
        Preset,
        Field(description="lego: units as trained, 2-norm; nsc: unit directions, largest entry."),
    ] = "lego",
    sign_canonical: Annotated[
        bool, Field(description="Turn units so that the largest entry of a is positive.")
    ] = False,
    iterations: Annotated[int, Field(ge=1, description="Rounds of k-means at most.")] = 10,
    parameter_reweight: Annotated[
        bool, Field(description="Give centroids the mean length of their members.")
    ] = True,
    output_reweight: Annotated[
        bool, Field(description="Multiply the delta by sqrt(r / k), r the input rank.")
    ] = True,
    scale: Annotated[Scale, usual("loguniform(0.3, 4)")] = 1.0,
) -> LoRAFactors:
    """Average similar units: `sum_c f_c^2 sqrt(r/k) b_c a_c`, `[a_c; b_c]` a cluster's mean.

    A unit is a row a of A with its column b of B. k-means splits the units `[a; b]` of all tasks
    into k clusters; `f_c` restores the length that averaging loses: mean length of the members over
    length of their mean.

    Paper: arXiv 2409.16167. Preset `nsc` is the baseline of arXiv 2603.26317:
    clusters `[a/|a|; b/|b|]`, averages `[a; b]`, and measures length by the largest entry. Differs:
    k-means runs on the Gram matrix of the units; first centres are drawn by k-means++ with a seed
    for each module; units that are zero are left out, so that a module trained to nothing equals
    one that is not there; ranks may differ, and r is the largest number of units of a task.

    The mean of `[a; b]` depends on how a delta is split into A and B, and `(a, b)` and `(-a, -b)`
    are one unit that lies far from itself, unless `sign_canonical` is set.

    Evidence: `init_idx`, `(k,)` whole numbers: units to start from, counted task by task.
    Cost: O(R^2 (d_out + d_in) + iterations k R^2) with R the sum of ranks.
    """
    factors = list(factors)
    a, b = torch.cat([f.a for f in factors]), torch.cat([f.b for f in factors], 1)
    alive = (a.abs().sum(1) > 0) & (b.abs().sum(0) > 0)
    largest = max(int(part.sum()) for part in alive.split([f.rank for f in factors]))
    if not alive.all():
        a, b = a[alive], b[:, alive]
    if len(a) == 0:
        return LoRAFactors(a, b)
    if sign_canonical:
        signs = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
        a, b = a * signs, b * signs.T
    first = _first_units((evidence or {}).get("init_idx"), alive, context.module)
    clusters = min(rank or largest, len(a)) if first is None else len(first)
    if clusters < len(a):
        gram = _gram(a, b, directions=preset == "nsc")
        if first is None:
            first = spread_out(gram, clusters, generator(context.seed, "lora_lego", context.module))
        mean = averages(lloyd(gram, first, iterations), clusters).float()
        a, b = _centroids(a, b, mean, preset, parameter_reweight)
    spread = (largest / clusters) ** 0.5 if output_reweight else 1.0
    return LoRAFactors(a, b * (scale * spread))


def _first_units(
    start: Tensor | None, alive: Bool[Tensor, " units"], module: str
) -> Int[Tensor, " k"] | None:
    """Return the places, among the units that are not zero, of those given that are not."""
    if start is None:
        return None
    if start.ndim != 1 or start.is_floating_point():
        raise InputError(
            f"evidence: {module}.init_idx: {tuple(start.shape)} of {start.dtype} but a list of "
            "whole numbers, one a cluster, is expected."
        )
    outside = [int(i) for i in start if not 0 <= i < len(alive)]
    if outside:
        raise InputError(
            f"{module}.init_idx: {outside[0]} but units 0 to {len(alive) - 1} are expected. "
            "Count the ranks of the tasks in the order of their names."
        )
    places = (alive.cumsum(0) - 1)[start.long()][alive[start.long()]]
    return places if len(places) else None


def _centroids(
    a: Float[Tensor, "units d_in"],
    b: Float[Tensor, "d_out units"],
    mean: Float[Tensor, "clusters units"],
    preset: Preset,
    reweight: bool,
) -> tuple[Float[Tensor, "clusters d_in"], Float[Tensor, "d_out clusters"]]:
    """Return each cluster's mean, brought to the mean length of its members; empty ones are 0."""
    new_a, new_b = mean @ a, b @ mean.T
    if not reweight:
        return new_a, new_b
    lengths = _lengths(new_a, new_b, preset)
    restore = torch.where(lengths > 0, (mean @ _lengths(a, b, preset)) / lengths, 0.0)
    return new_a * restore[:, None], new_b * restore


def _gram(a: Tensor, b: Tensor, *, directions: bool) -> Float[Tensor, "units units"]:
    """Return the inner products of `[a; b]`, or of `[a/|a|; b/|b|]`, float64."""
    a, b = a.double(), b.double()
    of_a, of_b = a @ a.T, b.T @ b
    if directions:
        for gram in (of_a, of_b):
            lengths = gram.diagonal().sqrt()
            gram /= lengths * lengths[:, None]
    return of_a + of_b


def _lengths(a: Tensor, b: Tensor, preset: Preset) -> Float[Tensor, " units"]:
    if preset == "nsc":
        return torch.maximum(a.abs().amax(1), b.abs().amax(0))
    return torch.hypot(a.norm(dim=1), b.norm(dim=0))
