"""FR-Merging: the sum of the deltas without their lowest frequencies."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from icm_ray.linalg.fourier import HighPass
from icm_ray.linalg.lowrank import NUMERICAL_RANK, norm
from icm_ray.methods.shared.parameters import Scale, usual
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.types import Delta, LoRAFactors, ModuleContext

ROWS = 128
"""Rows of a delta looked at together."""


def fr_merging(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    ratio: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="Radius that is kept, over the shorter side."),
        usual("uniform(0.1, 0.95)"),
    ] = 0.7,
    scale: Scale = 0.7,
    align: Annotated[
        bool, Field(description="Bring every task's filtered delta to the largest mean magnitude.")
    ] = True,
    preset: Annotated[
        Literal["fr", "free"],
        Field(description="fr: each frequency counts once; free: a thin ring twice, as published."),
    ] = "fr",
) -> LoRAFactors | Delta:
    """Filter and add: `scale * sum_k c_k highpass(delta_k)`, with `c_k = max_j m_j / m_k`.

    A delta is seen as a picture; frequencies farther than `ratio * min(d_out, d_in)` from the
    middle of its unshifted spectrum, the low ones, are removed. `m_k` is the mean magnitude of the
    filtered delta; `align=False` sets `c_k = 1`.

    Paper: arXiv 2411.16815, FR-Merging (the backbone; its task experts are no single adapter), and
    the code beside it. The defaults belong together: 0.7, 0.7 and align are what the code merges
    eight ViT-B/32 with. Differs: the code's two masks overlap where the distance is exactly
    `min(d_out, d_in) // 10` and count those frequencies twice (preset `free`). A task of which the
    filter leaves nothing but rounding is left out of the alignment.

    The filter is linear, so it runs once, on the sum. On a square module with a ratio near
    sqrt(1/2) it removes few frequencies, whose part of the sum has a small rank: the result is then
    a LoRA, exactly. Other modules give a dense delta.

    Cost: O(n log n) for n = d_out d_in with align, for every task; without, square modules cost
    O((d_out + d_in) R p) with p the removed frequencies of an axis.
    """
    factors = list(factors)
    high_pass = HighPass(factors[0].shape, ratio, ring_twice=preset == "free")
    weights = [scale] * len(factors)
    if align:
        means = [_mean_magnitude(f, high_pass) for f in factors]
        weights = [scale * max(means) / mean if mean else 0.0 for mean in means]
    return _filtered(weighted_sum(factors, weights), high_pass)


def _filtered(change: LoRAFactors | Delta, high_pass: HighPass) -> LoRAFactors | Delta:
    if isinstance(change, Delta):
        return Delta.of(high_pass.apply(change.dense()))
    d_out, d_in = change.shape
    rank = change.rank + high_pass.removed_rank()
    if rank * (d_out + d_in) > d_out * d_in:
        return Delta.of(high_pass.apply(change.delta()))
    b, a = high_pass.removed(change.b, change.a)
    return LoRAFactors(torch.cat([change.a, a]), torch.cat([change.b, -b], 1))


def _mean_magnitude(factors: LoRAFactors, high_pass: HighPass) -> float:
    """Return the mean magnitude of a filtered delta; 0 where rounding is all that is left."""
    delta = _filtered(factors, high_pass)
    if isinstance(delta, Delta):
        blocks = delta.blocks()
    else:
        blocks = (rows @ delta.a for rows in delta.b.split(ROWS))
    total = sum(float(block.abs().sum(dtype=torch.float64)) for block in blocks)
    entries = delta.shape[0] * delta.shape[1]
    before = norm(factors.b, factors.a) / entries**0.5
    return total / entries if total / entries > NUMERICAL_RANK * before else 0.0
