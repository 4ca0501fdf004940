"""Small matrices that stand for deltas between two shared bases: merging them, and the way back."""

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg import lowrank
from icm_ray.linalg.consensus import Vote, sum_of_signs, vote
from icm_ray.linalg.shared_basis import Basis
from icm_ray.linalg.sparsify import threshold
from icm_ray.methods.shared.blocks import dropped
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence


def merged_entries(
    inner: str,
    cores: Float[Tensor, "tasks p q"],
    context: ModuleContext,
    evidence: ModuleEvidence | None,
    shares: tuple[float, float],
) -> Float[Tensor, "p q"]:
    """Merge the float32 cores of one module entry by entry.

    Args:
        inner: "ties" or "dare_ties", with the module's majority where tasks cancel; "dare", or
            anything else for the plain sum.
        cores: Contiguous.
        context: Keys the draws of dare.
        evidence: `mask.<task>` in place of draws.
        shares: What ties trims to or dare keeps, and what dare_ties trims to besides.
    """
    density, trim_density = shares
    if inner in ("dare", "dare_ties"):
        shape = (cores.shape[1], cores.shape[2])
        cores = next(dropped(iter((cores,)), context, shape, density, evidence))
    if inner not in ("ties", "dare_ties"):
        return cores.sum(0)
    share = density if inner == "ties" else trim_density
    least = torch.tensor([threshold(entries, share) for entries in cores])
    ones = torch.ones(len(cores))
    most = sum_of_signs(cores, least, ones)
    return vote(cores, least, Vote(ones, ones, ones, zero=(most > 0) - (most < 0)))


def between(
    left: Basis, core: Float[Tensor, "p q"], right: Basis, *, scale: float, equal: bool
) -> LoRAFactors:
    """Return `scale * left core right^T`, all its singular values made their mean if `equal`."""
    spectrum = lowrank.dense_svd(core)
    root = (spectrum.s.mean().expand_as(spectrum.s) if equal else spectrum.s).sqrt()
    a = right.product(spectrum.right.T * root).T.contiguous()
    return LoRAFactors(a, left.product(spectrum.left * root * scale))
