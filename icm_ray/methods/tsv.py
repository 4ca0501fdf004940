"""TSV-Merge: the tasks' singular vectors, made orthogonal to each other before they are added."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from icm_ray.linalg.lowrank import svd
from icm_ray.linalg.orthogonal import polar
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights
from icm_ray.types import LoRAFactors, ModuleContext


def tsv(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    scale: Scale = 1.0,
    weights: Weights = None,
    keep: Annotated[
        int | None,
        Field(ge=1, description="At most this many singular directions a task; None keeps all."),
    ] = None,
) -> LoRAFactors:
    """Add up singular values along decorrelated directions: `scale * U diag(w s) V`.

    `delta_k = U_k diag(s_k) V_k`; U and V are the polar factors of `[U_1 .. U_K]` and
    `[V_1; ..; V_K]`, the orthonormal vectors nearest to all tasks' singular vectors at once, and
    `w_k = 1` multiplies the singular values of task k.

    Paper: arXiv 2412.00081, TSV-Merge. Differs: the paper keeps `min(d_out, d_in) / K`
    directions of every task, which gives adapters of smaller rank arbitrary directions of no
    strength that still push the others aside. Here a task brings the directions it has, and the
    paper's share caps them only if they are more than `min(d_out, d_in)` together.

    Cost: O(R^2 (d_out + d_in)); the result has rank R, the sum of ranks.
    """
    numbers = task_weights(context, weights, default=1.0)
    factors = list(factors)
    spectra = [svd(f.b, f.a) for f in factors]
    own = [x.s.numel() if w != 0 else 0 for x, w in zip(spectra, numbers, strict=True)]
    ranks = shares(own, min(factors[0].shape), keep)
    parts = list(zip(spectra, ranks, numbers, strict=True))
    u = polar(torch.cat([x.u[:, :rank] for x, rank, _ in parts], 1))
    v = polar(torch.cat([x.vh[:rank].T for x, rank, _ in parts], 1))
    strength = torch.cat([scale * w * x.s[:rank] for x, rank, w in parts])
    root = strength.abs().sqrt()
    return LoRAFactors((v * root).T.float().contiguous(), (u * (strength.sign() * root)).float())


def shares(own: Sequence[int], shorter_side: int, keep: int | None) -> list[int]:
    """Return how many directions each task brings, given how many it has.

    Args:
        own: Directions of each task.
        shorter_side: `min(d_out, d_in)` of the module, all the directions there are room for.
        keep: At most so many of a task; None sets no limit.
    """
    ranks = [min(rank, keep or rank) for rank in own]
    if sum(ranks) <= shorter_side:
        return ranks
    share = max(shorter_side // sum(rank > 0 for rank in ranks), 1)
    return [min(rank, share) for rank in ranks]
