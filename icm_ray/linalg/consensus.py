"""How entries of several tasks become one: sign election and the mean of those that agree.

Tasks are added one after another, in order, so that every route (blocks, compiled kernels, any
number of workers) rounds alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icm_ray.linalg import kernels

Election = Literal["values", "signs"]
Aggregate = Literal["mean", "sum"]


@dataclass(frozen=True)
class Vote:
    """What happens to the entries that survived the trim.

    Attributes:
        before: `(tasks,)`, multiplies each task's entries before the election.
        after: `(tasks,)`, multiplies those that agree with the elected sign.
        shares: `(tasks,)`, what a task that agrees adds to the divisor: ones for the mean, zeros
            for the sum. A divisor of 0 divides nothing.
        by: Elect the sign of the sum of the entries, or of the sum of their signs.
        zero: -1, 0 or 1: the sign where they cancel; 0 elects nothing.
    """

    before: Float[Tensor, " tasks"]
    after: Float[Tensor, " tasks"]
    shares: Float[Tensor, " tasks"]
    by: Election = "values"
    zero: int = 0


def vote(
    values: Float[Tensor, "tasks *shape"], least: Float[Tensor, " tasks"], how: Vote
) -> Float[Tensor, "*shape"]:
    """Trim entries below their task's `least` magnitude, elect signs, put together who agrees.

    Args:
        values: Entries of each task, contiguous, float32; left as they are.
        least: Threshold of each task; 0 trims nothing.
        how: The election and what comes after it.
    """
    out = torch.empty(values.shape[1:])
    loop = kernels.loop_for(values, kernels.vote)
    if loop is not None:
        numbers = (least.numpy(), how.before.numpy(), how.after.numpy(), how.shares.numpy())
        rest = (how.by == "signs", np.float32(how.zero), out.view(-1).numpy())
        loop(values.flatten(1).numpy(), *numbers, *rest)
        return out
    kept = _trimmed(values, least, how.before)
    signs = elected_signs(kept, how.by)
    signs += (1 - signs.abs()) * how.zero
    total, divisor = out.zero_(), torch.zeros_like(out)
    for entries, after, share in zip(kept, how.after.tolist(), how.shares.tolist(), strict=True):
        agreed = entries.mul_(signs).clamp_(min=0)
        divisor.add_(agreed.sign(), alpha=share)
        total += agreed if after == 1 else agreed.mul_(after)
    divisor += 1 - divisor.sign().abs()  # arithmetic: torch is ten times slower with masks
    return total.mul_(signs).div_(divisor)


def sum_of_signs(
    values: Float[Tensor, "tasks *shape"],
    least: Float[Tensor, " tasks"],
    before: Float[Tensor, " tasks"],
    by: Election = "values",
) -> int:
    """Return the sum of the signs that `vote` elects, 0 where tasks cancel."""
    loop = kernels.loop_for(values, kernels.sum_of_signs)
    if loop is not None:
        numbers = (least.numpy(), before.numpy())
        return int(loop(values.flatten(1).numpy(), *numbers, by == "signs"))
    return int(majority(elected_signs(_trimmed(values, least, before), by)))


def elected_signs(
    values: Float[Tensor, "tasks *shape"] | Sequence[Tensor], by: Election = "values"
) -> Float[Tensor, "*shape"]:
    """Return the sign of the sum of the entries (or of their signs): -1, 0 where they cancel, 1."""
    total = torch.zeros_like(values[0])
    for entries in values:
        total += entries if by == "values" else entries.sign()
    return total.sign_()


def majority(signs: Float[Tensor, "..."]) -> Int[Tensor, ""]:
    """Return the sum of signs as a whole number; its sign decides where entries cancel."""
    return signs.sum(dtype=torch.float64).long()


def agreeing(
    values: Float[Tensor, "tasks *shape"],
    signs: Float[Tensor, "*shape"],
    *,
    aggregate: Aggregate = "mean",
    weights: Sequence[float] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the mean (or sum) of the entries whose sign is the elected one; 0 if none is.

    Args:
        values: Entries of each task.
        signs: -1 or 1, the elected sign (0 elects nothing).
        aggregate: "mean" divides by the number of tasks that agree, which weights do not change.
        weights: Multiplies each task's entries after the election; None for ones.
    """
    total, count = torch.zeros_like(signs), torch.zeros_like(signs)
    for task, entries in enumerate(values):
        agrees = (entries * signs) > 0
        kept = entries if weights is None else entries * weights[task]
        total += torch.where(agrees, kept, 0.0)
        count += agrees
    return total if aggregate == "sum" else total / count.clamp(min=1)


def _trimmed(
    values: Float[Tensor, "tasks *shape"],
    least: Float[Tensor, " tasks"],
    factors: Float[Tensor, " tasks"],
) -> list[Tensor]:
    """Return each task's entries of at least its threshold times its factor, the others 0."""
    # `hardshrink` keeps what is larger than its number: the float below the threshold.
    below = torch.nextafter(least, torch.zeros(())).tolist()
    kept = [nn.functional.hardshrink(x, low) for x, low in zip(values, below, strict=True)]
    for entries, factor in zip(kept, factors.tolist(), strict=True):
        if factor != 1:
            entries.mul_(factor)
    return kept
