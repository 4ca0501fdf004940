"""The loop: every task's gradient, one reduction in a fixed order, one step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from icm_ray.checkpoint import Checkpoint
from icm_ray.config import OptimisationSpec
from icm_ray.errors import RecipeError
from icm_ray.evidence.learned import LearnedMerge
from icm_ray.learning.descent import STATE, Descent
from icm_ray.learning.gradients import Learning, TaskGradients, TaskLosses
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives.protocol import Objective
from icm_ray.linalg.threads import kernel_threads

Progress = Callable[[int, float], None]
"""Called after each step with the step's number and the mean loss."""


@dataclass(frozen=True)
class Run:
    """How a run is carried out; nothing here depends on the number of workers.

    Attributes:
        seed: Keys the order of batches.
        threads: Kernel threads.
        scratch: Existing folder for resumable state, or None.
        key: Identifies the run in `scratch`.
    """

    seed: int = 0
    threads: int = 1
    scratch: Path | None = None
    key: str = ""

    def of_stage(self, name: str) -> "Run":
        """Return the run of one of several stages, which keep their states apart."""
        if self.scratch is None:
            return self
        (self.scratch / name).mkdir(exist_ok=True)
        return replace(self, scratch=self.scratch / name)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Where the state goes, if it is kept."""
        return Checkpoint(self.scratch / STATE, self.key) if self.scratch else None


def learn(
    model: nn.Module,
    learning: Learning,
    tasks: Sequence[TaskInputs],
    run: Run | None = None,
    *,
    progress: Progress | None = None,
) -> LearnedMerge:
    """Learn a merge of the tasks' adapters.

    Args:
        model: The frozen base.
        learning: What is learned, what is minimised and how it moves.
        tasks: Adapters and inputs; tasks the objective says nothing about are still merged.
        run: How the run is carried out.
        progress: Told about each step.

    Raises:
        RecipeError: the objective covers no task, the options do not go together, or a loss is no
            number any more.
    """
    run, how = run or Run(), learning.optimisation
    covered = covered_tasks(tasks, learning.objective)
    groups = list(groups_of(covered, how))
    checkpoint = run.checkpoint
    with kernel_threads(run.threads):
        side = TaskGradients(model, learning, tasks, covered=covered, seed=run.seed)
        before = {task: side.start(task) for task in covered}
        descent = Descent(learning.parameters.tensors(), how)
        if checkpoint:
            descent.resume(checkpoint)
        while descent.step < how.steps:
            descent.move([side.gradient(group, descent.step) for group in groups])
            if checkpoint and descent.step % how.save_every == 0:
                descent.save(checkpoint)
            if progress:
                progress(descent.step, sum(descent.history[-1].values()) / len(covered))
        after = {task: side.components(task) for task in covered}
    return learned_merge(learning, tasks, report(descent, before, after))


def learned_merge(
    learning: Learning, tasks: Sequence[TaskInputs], report: Mapping[str, Any]
) -> LearnedMerge:
    """Return what was learned at the parameters' present values; its origin is the caller's."""
    parameters = learning.parameters
    adapters = {task.name: task.adapter.fingerprint for task in tasks}
    return LearnedMerge(parameters.learned(), parameters.terms.tasks, adapters, {}, report)


def covered_tasks(tasks: Sequence[TaskInputs], objective: Objective) -> tuple[str, ...]:
    """Return the sorted names of the tasks an objective says something about.

    Raises:
        RecipeError: there is none.
    """
    covered = tuple(sorted(task.name for task in tasks if objective.of(task) is not None))
    if not covered:
        raise RecipeError(
            f"objective: {type(objective).__name__} says nothing about any of the tasks. Give "
            "heads (and labels, for a supervised objective), or choose another objective."
        )
    return covered


def groups_of(tasks: Sequence[str], how: OptimisationSpec) -> Iterator[tuple[str, ...]]:
    """Return the tasks that share a forward pass, in order.

    Raises:
        RecipeError: a worst-task objective needs each task's gradient for itself.
    """
    size = how.tasks_per_forward
    if how.worst is not None and size > 1:
        raise RecipeError(
            f"tasks_per_forward: {size} but 1 is expected with a worst-task objective, which "
            "weighs each task's gradient. Leave one of them out."
        )
    return (tuple(tasks[i : i + size]) for i in range(0, len(tasks), size))


def report(
    descent: Descent, before: Mapping[str, TaskLosses], after: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Return what happened as plain data."""
    return {
        "losses": {
            task: {"base": b.base, "expert": b.expert, "start": b.start, "end": after[task]}
            for task, b in before.items()
        },
        "warnings": {task: b.warning for task, b in before.items() if b.warning},
        "unmoved": descent.unmoved,
        "history": {task: [step[task] for step in descent.history] for task in before},
    }
