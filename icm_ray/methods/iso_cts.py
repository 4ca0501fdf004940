"""Iso-CTS: Iso-C that gives part of its directions to what single tasks have besides the sum."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from icm_ray.linalg.lowrank import NUMERICAL_RANK, norm, svd
from icm_ray.linalg.orthogonal import polar
from icm_ray.methods.iso_c import flat, sum_of_deltas
from icm_ray.methods.shared.parameters import Scale
from icm_ray.types import LoRAFactors, ModuleContext


def iso_cts(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    scale: Scale = 1.0,
    common_fraction: Annotated[
        float,
        Field(ge=0, le=1, description="Share of the directions that are the sum's; rounded."),
    ] = 0.8,
) -> LoRAFactors:
    """Join common and task-specific directions, all of one strength: `scale * mean(s) U V`.

    The n singular directions of `sum_k delta_k` give way from the smallest on: about `1 -
    common_fraction` of them are replaced by as many from each task, the largest of
    `(I - U_c U_c^T) delta_k` with U_c the common ones that stay. U and V are the polar factors of
    all directions together, s their singular values.

    Paper: arXiv 2502.04959, Iso-CTS. Differs: n is the numerical rank of the sum
    where the paper has `min(d_out, d_in)` (see `iso_c`); tasks whose delta is zero have no
    directions to give and are not counted; directions of no strength are left out; and the
    share of the tasks cannot exceed n, which rounding would allow for small n.

    Cost: O(R^2 (d_out + d_in)) with R the sum of ranks.
    """
    factors = list(factors)
    whole = svd(*sum_of_deltas(factors))
    lengths = [norm(f.b, f.a) for f in factors]
    # Deltas that cancel, or lie inside of the common directions, leave rounding behind.
    n = int((whole.s > NUMERICAL_RANK * max(lengths)).sum())
    tasks = sum(length > 0 for length in lengths)
    each = _directions_of_each(n, tasks, common_fraction)
    common = n - each * tasks
    u_common = whole.u[:, :common]
    parts = [(u_common, whole.s[:common], whole.vh[:common].T)]
    for f, length in zip(factors, lengths, strict=True):
        parts.append(_own_directions(f, u_common, each, floor=NUMERICAL_RANK * length))
    u, v = (polar(torch.cat([part[i] for part in parts], 1)) for i in (0, 2))
    return flat(u, v, scale * float(torch.cat([part[1] for part in parts]).sum()))


def _directions_of_each(n: int, tasks: int, common_fraction: float) -> int:
    if tasks == 0:
        return 0
    return min(round((n - int(n * common_fraction)) / tasks), n // tasks)


def _own_directions(
    factors: LoRAFactors, u_common: Float[Tensor, "d_out c"], count: int, floor: float
) -> tuple[Float[Tensor, "d_out q"], Float[Tensor, " q"], Float[Tensor, "d_in q"]]:
    """Return up to `count` left directions, values and right directions outside of the common."""
    b = factors.b.double()
    rest = svd(b - u_common @ (u_common.T @ b), factors.a.double())
    keep = min(count, int((rest.s > floor).sum()))
    return rest.u[:, :keep], rest.s[:keep], rest.vh[:keep].T
