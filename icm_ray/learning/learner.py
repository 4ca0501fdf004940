"""The loop: every task's gradient, one reduction in a fixed order, one step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from icm_ray.errors import RecipeError
from icm_ray.evidence.learned import LearnedMerge
from icm_ray.learning.descent import Descent, Optimisation
from icm_ray.learning.gradients import TaskGradients, TaskLosses
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives import Objective
from icm_ray.learning.parameters import Parameters
from icm_ray.linalg.threads import kernel_threads

Progress = Callable[[int, float], None]
"""Called after each step with the step's number and the mean loss."""


@dataclass(frozen=True)
class Run:
    """How a run is carried out; nothing here depends on the number of workers.

    Attributes:
        seed: Keys the order of batches.
        tasks_per_forward: Tasks whose inputs share one forward pass: faster where inputs are
            short, at the price of as many times the activations.
        save_memory: Recompute blocks in the backward pass.
        threads: Kernel threads.
        save_every: Steps between saved states.
    """

    seed: int = 0
    tasks_per_forward: int = 1
    save_memory: bool = False
    threads: int = 1
    save_every: int = 50


def learn(
    model: nn.Module,
    tasks: Sequence[TaskInputs],
    parameters: Parameters,
    objective: Objective,
    options: Optimisation,
    run: Run | None = None,
    *,
    origin: Mapping[str, Any] | None = None,
    scratch: Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> LearnedMerge:
    """Learn a merge of the tasks' adapters.

    Args:
        model: The frozen base.
        tasks: Adapters and inputs; tasks the objective says nothing about are still merged.
        parameters: What is learned; left at the values it ends with.
        objective: What is minimised.
        options: How the parameters move.
        run: How the run is carried out.
        origin: How to say in the result what it was learned with.
        scratch: Existing folder for resumable state, or None.
        key: Identifies the run in `scratch`; see `Descent.save`.
        progress: Told about each step.

    Raises:
        RecipeError: the objective covers no task, or the options do not go together.
    """
    run = run or Run()
    covered = covered_tasks(tasks, objective)
    groups = list(groups_of(covered, run, options))
    weights = options.task_weights(covered)
    with kernel_threads(run.threads):
        side = TaskGradients(
            model,
            parameters,
            objective,
            tasks,
            weights=weights,
            seed=run.seed,
            save_memory=run.save_memory,
        )
        before = {task: side.start(task) for task in covered}
        descent = Descent(parameters.tensors(), options)
        if scratch:
            descent.resume(scratch, key)
        while descent.step < options.steps:
            descent.move([side.gradient(group, descent.step) for group in groups])
            if scratch and descent.step % run.save_every == 0:
                descent.save(scratch, key)
            if progress:
                progress(descent.step, sum(descent.history[-1].values()) / len(covered))
        after = {task: side.components(task) for task in covered}
    adapters = {task.name: task.adapter.fingerprint for task in tasks}
    told = report(parameters, descent, before, after)
    return LearnedMerge(parameters.learned(), parameters.terms.tasks, adapters, origin or {}, told)


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


def groups_of(tasks: Sequence[str], run: Run, options: Optimisation) -> Iterator[tuple[str, ...]]:
    """Return the tasks that share a forward pass, in order.

    Raises:
        RecipeError: a worst-task objective needs each task's gradient for itself.
    """
    size = run.tasks_per_forward
    if options.worst is not None and size > 1:
        raise RecipeError(
            f"tasks_per_forward: {size} but 1 is expected with a worst-task objective, which "
            "weighs each task's gradient. Leave one of them out."
        )
    return (tuple(tasks[i : i + size]) for i in range(0, len(tasks), size))


def report(
    parameters: Parameters,
    descent: Descent,
    before: Mapping[str, TaskLosses],
    after: Mapping[str, list[float]],
) -> dict[str, Any]:
    """Return what happened as plain data."""
    return {
        "losses": {
            task: {"base": b.base, "expert": b.expert, "start": b.start, "end": after[task]}
            for task, b in before.items()
        },
        "warnings": {task: b.warning for task, b in before.items() if b.warning},
        "unmoved": sorted(set(descent.leaves) - descent.moved),
        "history": {task: [step[task] for step in descent.history] for task in before},
    }
