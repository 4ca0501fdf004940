"""Heads re-aligned without labels: what an expert's head reads from a merge, told apart again.

A merge shifts the features that frozen heads read. Each output of a task's head gets a slope and an
intercept, fitted by least squares to what the task's own expert answers to the same unlabelled
inputs. It changes heads and no adapter, so a merge with such heads is another thing than the merge.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.adapters import open_adapter
from icm_ray.base_model.loading import Base
from icm_ray.base_model.low_rank import applied
from icm_ray.errors import RecipeError
from icm_ray.evaluation.answers import head_features
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.scoring import TaskData, task_data
from icm_ray.linalg.threads import kernel_threads
from icm_ray.suites import Suite
from icm_ray.types import Adapter

Answers = dict[tuple[str, str, int], Tensor]
"""What experts answered, by expert, examples and batch size; they are asked once."""


def realign_data(
    suite: Suite, experts: Mapping[str, Expert], limit: int | None
) -> dict[str, TaskData]:
    """Return the calibration inputs of each task that a head reads, with its expert.

    Raises:
        RecipeError: no task is read through a head.
    """
    known = task_data(suite, experts, "calibration", limit)
    found = {
        task: replace(item, expert=open_adapter(experts[task].adapter, task, saved_modules="drop"))
        for task, item in known.items()
        if item.head is not None
    }
    if not found:
        raise RecipeError("realign_heads: no task is read through a head. Leave it out.")
    return found


def realigned(
    base: Base,
    adapter: Adapter | None,
    data: Mapping[str, TaskData],
    *,
    batch: int = 64,
    threads: int = 1,
    memory: Answers | None = None,
) -> dict[str, Head]:
    """Return each task's head, its outputs fitted to the expert's where `adapter` makes features.

    Args:
        base: The base.
        adapter: The merge; None: the base alone.
        data: Unlabelled inputs, head and expert by task; answers in them are not read.
        batch: Examples a forward.
        threads: Kernel threads.
        memory: What experts answered, kept from call to call.
    """
    memory = {} if memory is None else memory
    heads = {}
    with kernel_threads(threads):
        for task, item in data.items():
            assert item.head is not None, "realign_data leaves out tasks without one"
            assert item.expert is not None
            key = (item.expert.fingerprint, item.examples.fingerprint, batch)
            if key not in memory:
                with applied(base.model, item.expert.load()):
                    memory[key] = _outputs(base, item, item.head, batch)
            with applied(base.model, adapter):
                heads[task] = fitted(item.head, _outputs(base, item, item.head, batch), memory[key])
    return heads


def _outputs(base: Base, item: TaskData, head: Head, batch: int) -> Float[Tensor, "rows outputs"]:
    return head.logits(head_features(base, item.examples, item.task, batch, head.pooling))


def fitted(
    head: Head, ours: Float[Tensor, "rows outputs"], theirs: Float[Tensor, "rows outputs"]
) -> Head:
    """Return a head whose outputs come closest to others by one slope and intercept each.

    An output that never moves keeps its slope.

    Args:
        head: What made `ours`.
        ours: Its outputs.
        theirs: What they are fitted to, for the same inputs.
    """
    ours, theirs = ours.double(), theirs.double()
    middle, wanted = ours.mean(0), theirs.mean(0)
    spread = (ours - middle).square().sum(0)
    together = ((ours - middle) * (theirs - wanted)).sum(0)
    slope = torch.where(spread > 0, together / spread.clamp_min(1e-30), 1.0)
    weight = head.weight.double() * slope[:, None]
    bias = head.bias.double() * slope + wanted - slope * middle
    return replace(head, weight=weight.float(), bias=bias.float())
