"""The cut as a module's inputs see it: what it takes away moves the outputs least."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.linalg import blockwise, lowrank
from icm_ray.linalg.gram import Gram
from icm_ray.merging.cut import Cut, RankRule, Seen, cut
from icm_ray.types import Delta, LoRAFactors


def cut_as_seen(result: LoRAFactors | Delta, rule: RankRule, inputs: Gram) -> Cut:
    """Return `U U^T result`, U the directions in which the module's outputs move most.

    Of all changes of that rank it is the nearest to `result` on inputs of second moment `inputs`: U
    are the first left singular vectors of `result inputs^1/2`. An energy that the rule asks for is
    a share of what these inputs see.

    Args:
        result: Of more ranks than the rule allows.
        rule: Any but "exact".
        inputs: Of full rank.

    Paper: arXiv 2403.07378, truncation-aware whitening. Differs: left vectors need no inverse.

    Cost: of factors O(rank d_in^2) beside the plain cut of a `(d_out, rank)` matrix; of dense
    results O(d_in^3), and O(d_out d_in^2) a pass.
    """
    done = cut(_before_root(result, inputs), rule)
    values = done.factors.b.double().square().sum(0)  # each factor has the root of every value
    u = done.factors.b.double() / values.sqrt()
    a = _turned(result, u).T.contiguous()  # as it comes back from a worker: sums keep their order
    strength = a.norm(dim=1)  # of u^T result, shared evenly by both factors
    factors = LoRAFactors(
        (a / strength.sqrt()[:, None]).float(), (u * strength.sqrt()).float().contiguous()
    )
    whole = _squares(result)
    kept = float(strength.square().sum()) / whole if whole > 0 else 1.0
    norm = _squares(result, inputs) ** 0.5
    seen = Seen(done.retained_energy, values / norm if norm > 0 else values)
    return replace(done, factors=factors, retained_energy=min(kept, 1.0), seen=seen)


def with_seen(done: Cut, result: LoRAFactors | Delta, inputs: Gram) -> Cut:
    """Return a cut by weights with what inputs see of it."""
    whole = _squares(result, inputs)
    lost = _squares(_less(result, done.factors), inputs)
    energy = 1 - min(lost / whole, 1.0) if whole > 0 else 1.0
    return replace(done, seen=Seen(energy))


def _before_root(result: LoRAFactors | Delta, inputs: Gram) -> LoRAFactors | Delta:
    """Return `result @ root`, or of factors what has the same left vectors and values."""
    if isinstance(result, LoRAFactors):
        a = result.a.double()
        return LoRAFactors(lowrank.root(inputs.left(a) @ a.T), result.b)
    root = torch.linalg.cholesky(inputs.square()).float()
    return Delta(result.shape, lambda: (block @ root for block in result.blocks()))


def _turned(result: LoRAFactors | Delta, u: Tensor) -> Float[Tensor, "d_in rank"]:
    """Return the transposed result times `u`, float64."""
    if isinstance(result, LoRAFactors):
        return result.a.double().T @ lowrank.gram(result.b, u)
    return blockwise.turned(result.shape[1], result.blocks, u.float()).double()


def _squares(result: LoRAFactors | Delta, inputs: Gram | None = None) -> float:
    """Return the squared norm: of the weights, or of what inputs see."""
    if isinstance(result, LoRAFactors):
        a = result.a.double()
        seen = a if inputs is None else inputs.left(a)
        return max(float((seen @ a.T * lowrank.gram(result.b, result.b)).sum()), 0.0)
    rows = (block.double() for block in result.blocks())
    return sum(float((x * (x if inputs is None else inputs.left(x))).sum()) for x in rows)


def _less(result: LoRAFactors | Delta, kept: LoRAFactors) -> LoRAFactors | Delta:
    """Return what a cut took away."""
    if isinstance(result, LoRAFactors):
        return LoRAFactors(torch.cat([result.a, kept.a]), torch.cat([result.b, -kept.b], 1))

    def blocks() -> Iterator[Tensor]:
        row = 0
        for block in result.blocks():
            yield block - kept.b[row : row + len(block)] @ kept.a
            row += len(block)

    return Delta(result.shape, blocks)
