"""The space of KnOTS: left singular vectors that all tasks share, and each task's coordinates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.linalg.shared_basis import basis_of, row_root
from icm_ray.methods.shared.blocks import deltas
from icm_ray.types import Delta, LoRAFactors, ModuleContext, ModuleEvidence


@dataclass(frozen=True)
class Knots:
    """`[delta_1 .. delta_K] = u @ [p_1 .. p_K]` with orthonormal `u`, numerical zeros dropped.

    Attributes:
        u: `(d_out, q)`, float32; by descending singular value.
        s: `(q,)`, the singular values, float32.
        coordinates: `p_k` of each task, `(q, d_in)`, as a product of factors.
    """

    u: Float[Tensor, "d_out q"]
    s: Float[Tensor, " q"]
    coordinates: tuple[LoRAFactors, ...]

    def whitened(self) -> "Knots":
        """Return the same deltas with the singular values in `u` and not in the coordinates."""
        parts = tuple(LoRAFactors(f.a, f.b / self.s[:, None]) for f in self.coordinates)
        return Knots(self.u * self.s, torch.ones_like(self.s), parts)

    def blocks(self) -> Iterator[Tensor]:
        """Yield row blocks of all tasks' coordinates, `(tasks, rows, d_in)`."""
        return deltas(self.coordinates) if self.u.shape[1] else iter(())

    def merged_by(self, method: Callable[..., Any], **params: Any) -> LoRAFactors:
        """Return `u @ method(coordinates)` as factors, exactly."""
        if not self.u.shape[1]:
            return LoRAFactors(torch.zeros(0, self.coordinates[0].shape[1]), self.u)
        merged: Delta = method(self.coordinates, **params)
        return LoRAFactors(merged.dense(), self.u)


def knots(
    factors: Sequence[LoRAFactors], evidence: ModuleEvidence | None, context: ModuleContext
) -> Knots:
    """Return the space of KnOTS of one module.

    Paper: arXiv 2410.19735. The deltas side by side are never made: with
    `a_k a_k^T = l_k l_k^T` their left singular vectors are those of `[b_1 l_1 .. b_K l_K]`.
    Of each column of `u` the entry of largest magnitude is positive, or the column's product with
    that of the evidence `U`, where the method is given one.

    Differs: singular values at or below 1e-6 of the largest are dropped. The reference drops those
    up to 1e-5, so that small adapters lose directions that larger ones of the same shape keep.

    Raises:
        InputError: the evidence `U` has another shape than `u`.
    """
    factors = list(factors)
    roots = torch.block_diag(*(row_root(f.a) for f in factors))
    basis = basis_of(torch.cat([f.b for f in factors], dim=1), roots)
    u = basis.product(torch.eye(basis.s.numel(), dtype=torch.float64))
    signs = evidence.get("U") if evidence else None
    if signs is not None and signs.shape != u.shape:
        raise InputError(
            f"evidence: {context.module}.U is {tuple(signs.shape)} but {tuple(u.shape)} is "
            "expected."
        )
    flips = _signs(u if signs is None else u * signs, largest=signs is None)
    cores = (basis.coordinates * flips.double()[:, None]).float()
    parts = cores.split([f.rank for f in factors], dim=1)
    coordinates = tuple(LoRAFactors(f.a, b) for f, b in zip(factors, parts, strict=True))
    return Knots(u * flips, basis.s.float(), coordinates)


def _signs(columns: Float[Tensor, "d_out q"], *, largest: bool) -> Float[Tensor, " q"]:
    """Return -1 for each column whose largest entry (or sum) is negative, else 1."""
    if largest and columns.numel():
        deciding = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    else:
        deciding = columns.sum(0)
    return torch.where(deciding < 0, -1.0, 1.0)


def coordinate_blocks(
    factors: Sequence[LoRAFactors],
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    **_params: Any,
) -> Iterator[Tensor]:
    """Yield row blocks of the coordinates: the `Entries` of `trim_passes`."""
    return knots(factors, evidence, context).blocks()
