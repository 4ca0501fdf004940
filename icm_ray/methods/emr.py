"""EMR-Merging: one unified change, and for each task a mask and a number that lead back."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from icm_ray.linalg.blocks import row_blocks
from icm_ray.methods.table import Pass
from icm_ray.types import Delta, LoRAFactors, ModuleContext, PerTask

Preset = Annotated[
    Literal["code", "paper"],
    Field(
        description="What a rescaler averages: code counts every module alike, paper every entry."
    ),
]


def emr(
    factors: Sequence[LoRAFactors], *, context: ModuleContext, preset: Preset = "code"
) -> PerTask:
    """Elect one sign an entry and keep the largest value of that sign; mask and rescale for tasks.

    `gamma = sign(sum_k delta_k)`, `unified = gamma * max_k |delta_k|` over the tasks of that sign,
    and for each task `rescaler_k * mask_k * unified` with `mask_k = [delta_k * gamma > 0]` and
    `rescaler_k = mean|delta_k| / mean|mask_k * unified|`. The unified change alone is one adapter
    for all tasks; the paper's numbers are those of the tasks' own, which a server would swap.

    Paper: arXiv 2405.17461. Where the deltas cancel the sign is -1, as in the code of
    the reference. Preset `code` adds up the means of all modules, as that code does; preset `paper`
    adds up their entries, so that large modules count for more. A task counts as a zero delta in
    modules it lacks. Differs: a task whose mask keeps nothing has rescaler 1, not a division by 0.

    Cost: O(K d_out d_in R) for the tasks' K changes: each block of one needs the deltas of all.
    """
    factors = list(factors)
    pairs, shape = [(f.b, f.a) for f in factors], factors[0].shape
    rescalers = context.statistics["rescaler"][context.rows].tolist()
    return PerTask(
        unified=Delta(shape, partial(_unified_blocks, pairs)),
        tasks={
            task: Delta(shape, partial(_task_blocks, pairs, position, rescaler))
            for position, (task, rescaler) in enumerate(zip(context.tasks, rescalers, strict=True))
        },
    )


def passes(**_params: Any) -> tuple[Pass, ...]:
    """Return the one pass that finds the rescalers, which average over the whole adapter.

    It leaves `rescaler` in `context.statistics`, float64 `(all tasks,)`.
    """
    return (Pass(_measure, _conclude),)


def _unified(
    block: Float[Tensor, "tasks rows d_in"],
) -> tuple[
    Float[Tensor, "tasks rows d_in"], Float[Tensor, "rows d_in"], Float[Tensor, "rows d_in"]
]:
    """Return each task's values where they agree with the elected sign, the largest, the sign."""
    # Products with 0 and 1 throughout: `torch.where` takes ten times as long on random masks.
    sign = (block.sum(0) > 0).float().mul_(2).sub_(1)
    agreeing = (block * sign).clamp_(min=0)
    return agreeing, agreeing.amax(0), sign


def _unified_blocks(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    for block in row_blocks(pairs):
        _, largest, sign = _unified(block)
        yield largest.mul_(sign)


def _task_blocks(
    pairs: Sequence[tuple[Tensor, Tensor]], position: int, rescaler: float
) -> Iterator[Tensor]:
    for block in row_blocks(pairs):
        agreeing, largest, sign = _unified(block)
        yield agreeing[position].sign_().mul_(largest).mul_(sign).mul_(rescaler)


def _measure(
    factors: Sequence[LoRAFactors], *, context: ModuleContext, preset: str
) -> Mapping[str, Tensor]:
    own, masked = torch.zeros(2, len(context.all_tasks), dtype=torch.float64)
    rows = context.rows
    factors = list(factors)
    for block in row_blocks([(f.b, f.a) for f in factors]):
        agreeing, largest, _ = _unified(block)
        own[rows] += block.abs_().sum(-1).sum(-1, dtype=torch.float64)
        masked[rows] += agreeing.sign_().mul_(largest).sum(-1).sum(-1, dtype=torch.float64)
    entries = math.prod(factors[0].shape) if preset == "code" else 1
    return {"own": own / entries, "masked": masked / entries}


def _conclude(total: Mapping[str, Tensor], **_params: Any) -> Mapping[str, Tensor]:
    own, masked = total["own"], total["masked"]
    return {"rescaler": torch.where(masked > 0, own / masked.clamp(min=1e-300), 1.0)}
