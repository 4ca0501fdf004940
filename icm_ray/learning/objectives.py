"""What is minimised: how far a merge is from what each task's expert saw, said or was right about.

An objective is a small frozen value; `of(inputs)` makes one task's, or None where it says nothing
about the task. A task's objective measures sums and a count per batch, so that means over
batches of any size are exact; its components (one per target module, or one) are each divided by
their scale and then averaged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.base_model.states import Batch
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.targets import Targets
from icm_ray.linalg.subspace import null_space_ratio, row_space

Scaling = Literal["none", "energy", "start"]
"""Divide a task's components by nothing, by the size of what they compare with, or by their
values at the start."""

Memory = Mapping[str, Tensor]
"""What is kept of one batch: values of the expert and, under "energy", sums to divide by."""

Measured = tuple[Float[Tensor, " components"], float]
"""Sums over a batch by component, and the number of things summed."""


@runtime_checkable
class TaskObjective(Protocol):
    """One task's objective.

    Attributes:
        modules: Targets whose inputs are needed.
        hidden: Whether the last hidden state is needed.
        compares: Whether the expert and the base have to run once over the inputs.
    """

    modules: tuple[str, ...]
    hidden: bool
    compares: bool

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what is kept of a batch; it is asked for once."""
        ...

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return what the merge makes of a batch."""
        ...


@runtime_checkable
class Objective(Protocol):
    """What a recipe names."""

    @property
    def scaling(self) -> Scaling:
        """What a task's components are divided by."""
        ...

    def of(self, inputs: TaskInputs) -> TaskObjective | None:
        """Return one task's objective, or None where it says nothing about the task."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a target's input count.

    Attributes:
        padding: Whether padding counts, as in the NSC authors' code.
        skip_first: Whether the first token, which many models park a huge constant on, is left out.
    """

    padding: bool = False
    skip_first: bool = False

    def weights(self, batch: Batch, inputs: Tensor) -> Float[Tensor, " rows"]:
        """Return 1 for each row of the flattened inputs that counts, 0 for others."""
        mask = torch.ones_like(batch.mask) if self.padding else batch.mask.clone()
        if self.skip_first:
            mask[:, 0] = False
        if inputs.shape[:2] != mask.shape:  # one row an example: a pooled state
            return inputs.new_ones(inputs.shape[:-1]).float().flatten()
        return mask.to(inputs.device, torch.float32).flatten()


REAL_TOKENS = Tokens()
QUARTER = Targets("output", share=0.25)
LAST_BLOCK = Targets("all", share=1e-9)


@dataclass(frozen=True)
class NullSpaceRatio:
    """Mean null-space ratio of the merge's inputs under the task's own A.

    Paper: NSC, arXiv 2603.26317, Eq. 1 to 6. The ratio is a mean over tokens and target modules.
    Differs: padding is left out unless asked for, and A is whitened by an orthonormal basis in
    float64, so that the adapter's scaling cannot enter.
    """

    targets: Targets = QUARTER
    tokens: Tokens = REAL_TOKENS
    scaling: Scaling = "none"

    def of(self, inputs: TaskInputs) -> "_Ratio":
        """Return the task's objective over its own adapted modules."""
        return _Ratio(_bases(inputs, self.targets), self.tokens)


class _Ratio:
    hidden, compares = False, True

    def __init__(self, bases: dict[str, Tensor], tokens: Tokens) -> None:
        self.bases, self.tokens, self.modules = bases, tokens, tuple(bases)

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of expert and base the measure compares with."""
        return {}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        sums, count = [], 0.0
        for path, basis in self.bases.items():
            z = seen.inputs[path]
            weights = self.tokens.weights(batch, z)
            with torch.autocast(z.device.type, enabled=False):
                ratios = null_space_ratio(z.reshape(-1, z.shape[-1]), basis.to(z.device))
            sums.append((ratios * weights).sum())
            count = float(weights.sum())
        return torch.stack(sums), count


@dataclass(frozen=True)
class RowSpaceMatch:
    """The merge's inputs, seen through the task's own A, should be what the expert saw there.

    Per target module: `sum |Q' (z_merge - z_expert)|^2 / sum |Q' z_expert|^2` with Q an orthonormal
    basis of A's rows. It needs no labels, no heads and no outputs, and unlike the null-space ratio
    it is zero for the expert alone.

    Attributes:
        targets: Which modules; the default is everything adapted in the last block.
        tokens: Which tokens.
        against: What the error is divided by: the expert's own values, or the gap between the
            base's and the expert's, which makes the base's loss 1.
    """

    targets: Targets = LAST_BLOCK
    tokens: Tokens = REAL_TOKENS
    against: Literal["expert", "gap"] = "expert"
    scaling: Scaling = "energy"

    def of(self, inputs: TaskInputs) -> "_RowSpace":
        """Return the task's objective over its own adapted modules."""
        return _RowSpace(_bases(inputs, self.targets), self.tokens, self.against)


class _RowSpace:
    hidden, compares = False, True

    def __init__(self, bases: dict[str, Tensor], tokens: Tokens, against: str) -> None:
        self.bases, self.tokens, self.against = bases, tokens, against
        self.modules = tuple(bases)

    def _projected(self, seen: Seen, path: str) -> Tensor:
        z = seen.inputs[path]
        return z.reshape(-1, z.shape[-1]).float() @ self.bases[path].to(z.device)

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of expert and base the measure compares with."""
        memory = {path: self._projected(expert, path) for path in self.bases}
        energies = []
        for path, y in memory.items():
            gap = y - self._projected(base, path) if self.against == "gap" else y
            weights = self.tokens.weights(batch, expert.inputs[path])
            energies.append((gap.square().sum(-1) * weights).sum())
        return {**memory, "energy": torch.stack(energies)}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        sums, count = [], 0.0
        for path in self.bases:
            error = (self._projected(seen, path) - memory[path]).square().sum(-1)
            weights = self.tokens.weights(batch, seen.inputs[path])
            sums.append((error * weights).sum())
            count = float(weights.sum())
        return torch.stack(sums), count


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
        reads = inputs.head.weight if self.heads and inputs.head else None
        if reads is not None and inputs.kind in ("classification", "dense_classification"):
            reads = reads - reads.mean(0)
        return _TaskVector(self.pooling, inputs.dense, reads)


class _TaskVector:
    hidden, compares, modules = True, True, ()

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
        """Return what of expert and base the measure compares with."""
        (states, weights), (before, _) = self._states(batch, expert), self._states(batch, base)
        return {"states": states, "energy": self._squares(states - before, weights)}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        states, weights = self._states(batch, seen)
        return self._squares(states - memory["states"], weights), float(weights.sum())


def _bases(inputs: TaskInputs, targets: Targets) -> dict[str, Tensor]:
    """Return an orthonormal basis of A's rows for each target of a task."""
    adapter = inputs.adapter
    linear = {
        path: f for path, f in adapter.modules.items() if f.rank and path not in adapter.layouts
    }
    return {path: row_space(linear[path].a) for path in targets.choose(linear)}
