"""A merge's task vector on each input beside that of the task's expert."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from icm_ray.base_model.states import Batch
from icm_ray.evaluation.heads import Head
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives.protocol import Measured, Memory, Scaling, TaskObjective


@dataclass(frozen=True)
class TaskVectorMatch:
    """The merge's task vector on each input of task k should be the one of expert k.

    `sum |h_merge(x) - h_expert(x)|^2 / sum |h_expert(x) - h_base(x)|^2` over the task's inputs, h
    the pooled last hidden state of ICM-Fusion's Eq. 1 (arXiv 2508.04153): direction and length,
    per example. It needs no labels, and the base's loss is 1.

    A head reads few of the directions of h, and most of the error may lie in the others. With
    `heads`, the same ratio of what the task's frozen head makes of h is a second component; for
    classes, logits up to a common shift, which no probability depends on.

    Attributes:
        pooling: Compare the mean over an example's tokens, or each token's state. Where a head
            reads each patch of an image, "mean" compares these, since a mean says nothing of them.
        heads: Look through the heads too, for tasks that have one.
    """

    pooling: Literal["mean", "tokens"] = "mean"
    heads: bool = False
    scaling: Scaling = "energy"

    def of(self, inputs: TaskInputs) -> "_TaskVector":
        """Return the task's objective."""
        head = inputs.head if self.heads else None
        is_class = inputs.kind in ("classification", "dense_classification")
        if head is not None and (head.pooling != "mean" or head.dense is not None):
            return _ThroughHead(self.pooling, head, is_class)
        reads = head.weight if head is not None else None
        if reads is not None and is_class:
            reads = reads - reads.mean(0)
        return _TaskVector(self.pooling, inputs.dense, reads)


class _TaskVector(TaskObjective):
    def __init__(self, pooling: str, dense: bool, reads: Tensor | None) -> None:
        self.pooling, self.dense, self.reads = pooling, dense, reads

    def _states(self, batch: Batch, seen: Seen) -> tuple[Tensor, Tensor]:
        if self.pooling == "mean":
            states = seen.read(batch, self.dense).float()
            return states, states.new_ones(len(states))
        assert seen.hidden is not None
        states = seen.hidden.flatten(0, 1).float()
        return states, batch.mask.to(states.device).flatten().float()

    def _squares(self, gaps: Tensor, weights: Tensor) -> Tensor:
        """Return the squared length of the gaps, and of what the head reads of them."""
        views = [gaps] if self.reads is None else [gaps, gaps @ self.reads.T.to(gaps)]
        return torch.stack([(view.square().sum(-1) * weights).sum() for view in views])

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of the expert the measure compares with."""
        (states, weights), (before, _) = self._states(batch, expert), self._states(batch, base)
        return {"states": states, "energy": self._squares(states - before, weights)}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        states, weights = self._states(batch, seen)
        return self._squares(states - memory["states"], weights), float(weights.sum())


class _ThroughHead(_TaskVector):
    """Looks through a head that reads another state than the mean: its logits are compared."""

    def __init__(self, pooling: str, head: Head, is_class: bool) -> None:
        super().__init__(pooling, False, None)
        self.head, self.is_class = head, is_class

    def _logits(self, batch: Batch, seen: Seen) -> Tensor:
        logits = self.head.logits(seen.read(batch, False, self.head.pooling).float())
        return logits - logits.mean(-1, keepdim=True) if self.is_class else logits

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of the expert the measure compares with."""
        memory, logits = super().remember(batch, expert, base), self._logits(batch, expert)
        gap = (self._logits(batch, base) - logits).square().sum()
        return {**memory, "logits": logits, "energy": torch.cat([memory["energy"], gap[None]])}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        sums, count = super().measure(batch, seen, memory)
        gap = (self._logits(batch, seen) - memory["logits"]).square().sum()
        return torch.cat([sums, gap[None]]), count
