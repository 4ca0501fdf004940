"""What the learner asks of an objective: what it looks at, what it remembers, what it measures.

An objective is a small frozen value; `of(inputs)` makes one task's, or None where it says nothing
about the task. A task's objective measures sums and a count per batch, so that means over
batches of any size are exact; its components (one per target module, or one) are each divided by
their scale and then averaged.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from icm_ray.base_model.states import Batch
from icm_ray.learning.inputs import Seen, TaskInputs

Scaling = Literal["none", "energy", "start", "larger"]
"""Divide a task's components by nothing, by the size of what they compare with, by their values at
the start, or by the larger of the two."""

Memory = Mapping[str, Tensor]
"""What is kept of one batch: values of the expert and, under "energy", sums to divide by."""

Measured = tuple[Float[Tensor, " components"], float]
"""Sums over a batch by component, and the number of things summed."""


@runtime_checkable
class TaskObjective(Protocol):
    """One task's objective; those that inherit from it say only what is special about them.

    Attributes:
        modules: Targets whose inputs are needed.
        hidden: Whether the last hidden state is needed.
        compares: Whether the expert and the base have to run once over the inputs.
    """

    modules: tuple[str, ...] = ()
    hidden: bool = True
    compares: bool = True

    def taught(self, expert: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return the inputs with the expert's answers, once and beforehand; here as they are."""
        return batches

    def answered(self, merge: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return a step's inputs with the merge's own answers; here as they are."""
        return batches

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what is kept of a batch to compare with; it is asked for once."""
        return {}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component of what the merge makes of a batch, and what they count."""
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
