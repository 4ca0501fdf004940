"""From learned tensors back to one module's exact low-rank change."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icm_ray.linalg.orthogonal import polar
from icm_ray.types import LoRAFactors, ModuleEvidence


def rebuild(
    factors: Mapping[str, LoRAFactors], tasks: tuple[str, ...], learned: ModuleEvidence
) -> LoRAFactors:
    """Return one module's merge from the adapters' factors and what was learned.

    Args:
        factors: The adapters' own factors by task, tasks without the module left out.
        tasks: All tasks, sorted: the rows of the coefficients.
        learned: Tensors by kind, stored as `<module>.<kind>`; rows of learned methods name them.

    Returns:
        Exact factors; their rank is the sum of ranks, plus the residual's.
    """
    terms = {
        task: LoRAFactors(learned[f"a.{task}"], learned[f"b.{task}"])
        if f"a.{task}" in learned
        else own
        for task, own in factors.items()
    }
    residual = None
    if "residual_a" in learned:
        residual = LoRAFactors(learned["residual_a"], learned["residual_b"])
    if "a" in learned:
        merged = LoRAFactors(learned["a"], learned["b"])
    elif "coefficients" in learned:
        values = learned["coefficients"]
        rows, blocks = positions(terms, tasks, values.shape[1])
        left, right = stacks(terms)
        merged = combined(left, values[rows, blocks], right)
    else:
        core = learned["core"]
        ranks = sum(term.rank for term in terms.values())
        left, right = bases(terms, residual if core.shape[0] > ranks else None)
        merged = combined(left, core, right)
    return merged if residual is None else added(merged, residual)


def positions(
    terms: Mapping[str, LoRAFactors], tasks: tuple[str, ...], blocks: int
) -> tuple[Int[Tensor, " ranks"], Int[Tensor, " ranks"]]:
    """Return which coefficient multiplies each rank of the stack: its row and its column.

    A term of rank r is cut into `blocks` runs of consecutive ranks: rank i is in block
    `i * blocks // r`. With one block a task has one coefficient; with r, one a rank.
    """
    rows = [tasks.index(task) for task, term in terms.items() for _ in range(term.rank)]
    columns = [i * blocks // term.rank for term in terms.values() for i in range(term.rank)]
    return torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)


def stacks(
    terms: Mapping[str, LoRAFactors],
) -> tuple[Float[Tensor, "d_out ranks"], Float[Tensor, "ranks d_in"]]:
    """Return all terms side by side, `(b, a)`."""
    b = torch.cat([term.b.float() for term in terms.values()], 1)
    return b, torch.cat([term.a.float() for term in terms.values()])


def bases(
    terms: Mapping[str, LoRAFactors], extra: LoRAFactors | None = None
) -> tuple[Float[Tensor, "d_out ranks"], Float[Tensor, "ranks d_in"]]:
    """Return the bases a core stands between: polar factors of the two stacks.

    A polar factor is free of the sign and order of singular vectors, so whoever recomputes it gets
    the same one.

    Args:
        terms: One module's terms.
        extra: A change whose row and column space the bases span too.
    """
    left, right = stacks(terms if extra is None else {**terms, "": extra})
    return polar(left).float().contiguous(), polar(right.T).T.float().contiguous()


def combined(
    left: Float[Tensor, "d_out p"], core: Tensor, right: Float[Tensor, "q d_in"]
) -> LoRAFactors:
    """Return `left @ core @ right` as factors; a core of one axis is a diagonal."""
    return LoRAFactors(right, left * core if core.ndim == 1 else left @ core)


def added(one: LoRAFactors, two: LoRAFactors) -> LoRAFactors:
    """Return the sum of two changes as factors of the summed rank."""
    return LoRAFactors(torch.cat([one.a, two.a]), torch.cat([one.b, two.b], 1))
