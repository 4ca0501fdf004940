"""Steps around any method: what is done to a module's adapters before it, and to its result after.

They are set among a merge's params, beside the method's own: `params: {restore_norm: true}`.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from icm_ray.linalg.shared_basis import Basis, basis_of
from icm_ray.linalg.subspace import row_space
from icm_ray.types import LoRAFactors

Factor = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True)
class Steps:
    """What is done around a method; nothing unless asked for.

    A calibration comes before the method, its passes included. The rest multiplies the result as
    it will be written, after the cut, so it holds for streamed results too and costs one number.
    """

    restore_norm: Annotated[
        bool,
        Field(description="Scale each module's result to the mean norm of the adapters' changes."),
    ] = False
    calibrate: Annotated[
        Literal["a", "b", "measured"] | None,
        Field(description="Weaken the directions that adapters share in A, in B, or where more."),
    ] = None
    scale_first: Annotated[
        Factor, Field(description="Multiplies the first block; blocks between lie between.")
    ] = 1.0
    scale_last: Annotated[Factor, Field(description="Multiplies the last block.")] = 1.0

    @property
    def asked(self) -> dict[str, Any]:
        """What is not as it is by itself."""
        values = ((one.name, getattr(self, one.name), one.default) for one in fields(self))
        return {name: value for name, value, default in values if value != default}

    def factor(self, norm: float, norms: Iterable[float], depth: float | None) -> float:
        """Return what a module's result is multiplied by.

        Args:
            norm: Frobenius norm of the result.
            norms: Of the deltas that are part of it; zeros do not count.
            depth: 0 for the first block, 1 for the last; None outside of blocks, which keep 1.
        """
        factor, heard = 1.0, [one for one in norms if one > 0]
        if self.restore_norm and norm > 0 and heard:
            factor = sum(heard) / len(heard) / norm
        if depth is None:
            return factor
        return factor * (self.scale_first + (self.scale_last - self.scale_first) * depth)

    def before(self, factors: Sequence[LoRAFactors]) -> Sequence[LoRAFactors]:
        """Return a module's factors as the method sees them; see `calibrated`."""
        return calibrated(factors, self.calibrate) if self.calibrate else factors


STEPS: Mapping[str, inspect.Parameter] = inspect.signature(Steps, eval_str=True).parameters
"""What any method takes among its params, by name."""


def calibrated(
    factors: Sequence[LoRAFactors], side: Literal["a", "b", "measured"]
) -> list[LoRAFactors]:
    """Weaken the directions of one side that several tasks use: `x_k + U diag(c - 1) U^T x_k`.

    `[x_1 .. x_K] = U diag(s) V^T` are the B side by side, or the A transposed;
    `c_j = 1 / (1 + (K - 1) s_j^2 / sum s^2)`. K counts the tasks with a change, and one alone is
    left as it is.

    Paper: arXiv 2604.16826, on B. Differs: adapters of one initialisation crowd A and not B, so
    either side may be chosen, or measured: the one whose spans coincide more (mean squared cosine
    of the principal angles of each two tasks, in this module). Like the paper's, it looks at
    factors as they are, so how a delta is split into B and A counts. What norm it takes
    `restore_norm` gives back.

    Cost: O(R^2 (d_out + d_in)); holds a module of all adapters.
    """
    ranks = [f.rank for f in factors]
    sides = {"a": torch.cat([f.a for f in factors]).T, "b": torch.cat([f.b for f in factors], 1)}
    bases = {name: basis_of(stack) for name, stack in sides.items()}
    if side == "measured":
        side = "a" if _overlap(bases["a"], ranks) > _overlap(bases["b"], ranks) else "b"
    basis = bases[side]
    tasks = sum(bool(f.a.any() and f.b.any()) for f in factors)
    shares = basis.s.square() / basis.s.square().sum()
    change = 1 / (1 + (tasks - 1) * shares) - 1 if tasks else torch.zeros_like(shares)
    moved = basis.product(change[:, None] * basis.coordinates)
    parts = zip(factors, moved.split(ranks, dim=1), strict=True)
    if side == "a":
        return [LoRAFactors(f.a + part.T, f.b, f.scaling) for f, part in parts]
    return [LoRAFactors(f.a, f.b + part, f.scaling) for f, part in parts]


def _overlap(basis: Basis, ranks: list[int]) -> float:
    """Return how far the tasks' spans coincide: 0 not at all, 1 wholly."""
    spans: list[Float[Tensor, "q own"]] = [
        row_space(own.T) for own in basis.coordinates.split(ranks, dim=1)
    ]
    found = [
        float((x.T @ y).square().sum()) / min(x.shape[1], y.shape[1])
        for x, y in combinations([span for span in spans if span.shape[1]], 2)
    ]
    return sum(found) / len(found) if found else 0.0
