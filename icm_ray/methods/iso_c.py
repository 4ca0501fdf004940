"""Iso-C: the sum of the deltas with all its singular values made equal."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg.lowrank import stack, svd
from icm_ray.methods.shared.parameters import Scale
from icm_ray.types import LoRAFactors, ModuleContext


def iso_c(
    factors: Sequence[LoRAFactors], *, context: ModuleContext, scale: Scale = 1.0
) -> LoRAFactors:
    """Flatten the spectrum of the sum: `scale * mean(s) U V` with `sum_k delta_k = U diag(s) V`.

    Paper: arXiv 2502.04959, Iso-C. Differs: the mean runs over the numerical rank.
    The paper's runs over `min(d_out, d_in)` values, of which adapters leave most at zero, and
    spreads the strength over directions nobody trained; its mean is smaller by rank over
    `min(d_out, d_in)`, so a tuned scale does not carry over.

    Singular values are counted as zero below 1e-6 of the largest; one near that limit counts as
    much as any other once it is in.

    Cost: O(R^2 (d_out + d_in)) with R the sum of ranks.
    """
    spectrum = svd(*sum_of_deltas(factors))
    return flat(spectrum.u, spectrum.vh.T, scale * float(spectrum.s.sum()))


def sum_of_deltas(factors: Sequence[LoRAFactors]) -> tuple[Tensor, Tensor]:
    """Return `(b, a)` of the sum of the deltas."""
    return stack([(f.b, f.a) for f in factors], [1.0] * len(factors))


def flat(u: Float[Tensor, "d_out q"], v: Float[Tensor, "d_in q"], total: float) -> LoRAFactors:
    """Return factors of `u @ v.T` times the mean of q singular values that sum up to `total`."""
    mean = total / max(u.shape[1], 1)
    root = abs(mean) ** 0.5
    signed = root if mean >= 0 else -root
    return LoRAFactors((root * v).T.float().contiguous(), (signed * u).float())
