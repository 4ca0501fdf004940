"""Learned merging in parallel: one actor a group of tasks, one reduction in a fixed order.

Each step every actor returns the gradient of its tasks' losses; the driver adds them up in the
order of the tasks' names, makes one step and sends the new values out. A group's share depends on
values and step alone, so any number of actors gives the bytes of `learning.learner.learn`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import torch

from icm_ray.distributed.cluster import fetch, worker_count, worker_options
from icm_ray.distributed.faults import MAX_RETRIES, lost_work
from icm_ray.distributed.progress import Bar, bar
from icm_ray.distributed.session import Session
from icm_ray.errors import ClusterError
from icm_ray.evidence.learned import LearnedMerge
from icm_ray.learning.descent import Descent
from icm_ray.learning.gradients import Learning, Share, TaskGradients, TaskLosses
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run, covered_tasks, groups_of, learned_merge, report
from icm_ray.learning.objectives import objective_of
from icm_ray.learning.recipes import Plan
from icm_ray.linalg.threads import kernel_threads

Group = tuple[str, ...]
Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LearnOrder:
    """One run, the same for every actor.

    Attributes:
        plan: What is learned, minimised and started from.
        tasks: Adapters and inputs of every task.
        run: Seed, threads, and where the driver keeps its state.
    """

    plan: Plan
    tasks: Sequence[TaskInputs]
    run: Run


@ray.remote(max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES)
class TaskActor:
    """Holds some tasks: their adapters' whitening, their inputs, and what expert and base said.

    Everything is made anew by a restarted actor, at the same start values, so one that died is
    replaced without a trace.
    """

    def __init__(self, session: Session, order: LearnOrder, groups: Sequence[Group]) -> None:
        torch.set_num_threads(order.run.threads)
        base = session.load_base()
        mine = {task for group in groups for task in group}
        self.groups, self.threads = groups, order.run.threads
        with kernel_threads(self.threads):
            learning = order.plan.learning(base)
            self.side = TaskGradients(
                base.model,
                learning,
                [task for task in order.tasks if task.name in mine],
                covered=covered_tasks(order.tasks, learning.objective),
                seed=order.run.seed,
            )
            self.losses = {task: self.side.start(task) for task in sorted(mine)}

    def starts(self) -> dict[str, TaskLosses]:
        """Return what each task's objective says of base, expert and start."""
        return self.losses

    def step(self, values: Values, number: int) -> list[Share]:
        """Return losses and gradients of this actor's groups at `values`."""
        with kernel_threads(self.threads):
            self.side.load(values)
            return [self.side.gradient(group, number) for group in self.groups]

    def ends(self, values: Values) -> dict[str, list[float]]:
        """Return each task's components at `values`."""
        with kernel_threads(self.threads):
            self.side.load(values)
            return {task: self.side.components(task) for task in self.losses}

    def cpu_seconds(self) -> float:
        """Return the processor time this actor has used so far."""
        return time.process_time()


def learn_on_ray(session: Session, order: LearnOrder, label: str) -> tuple[LearnedMerge, float]:
    """Return a merge learned over the cluster and its cost; see `learning.learner.learn`.

    The cost is the processor time of all actors in seconds, from the start or the last resumption.

    Args:
        session: The base, and what each actor gets.
        order: The run.
        label: Shown by the progress bar.

    Raises:
        RecipeError: a loss is no number any more.
        ClusterError: an actor died more often than it is restarted, or the time-out passed.
    """
    how = order.plan.spec.optimisation
    covered = covered_tasks(order.tasks, objective_of(order.plan.spec.objective, None))
    groups = list(groups_of(covered, how))
    count = worker_count(session.resources, len(groups))
    held, wants = ray.put(order), worker_options(session.resources)
    kind: Any = TaskActor  # what `ray.remote` returns is not what type checkers see

    start = kind.options(**wants).remote
    shares = {_names(groups[i::count]): groups[i::count] for i in range(count)}
    actors = {names: start(session, held, mine) for names, mine in shares.items()}
    crew = _Crew(actors, session.resources.timeout_seconds)
    try:
        with bar(how.steps, f"learn {label}") as drawn:
            return _learned(crew, order, covered, drawn)
    finally:
        crew.close()


def _names(groups: Sequence[Group]) -> str:
    return ", ".join(task for group in groups for task in group)


@dataclass
class _Crew:
    """The actors of a run, by the names of their tasks.

    Attributes:
        actors: Handles.
        timeout: Longest wait for an answer of all of them, seconds.
    """

    actors: Mapping[str, Any]
    timeout: float

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors.values():
            ray.kill(actor)

    def ask(self, what: str, call: Callable[[Any], Any]) -> list[Any]:
        """Return every actor's answer to a call, in order.

        Raises:
            LostWork: some died each time; it names their tasks.
            ClusterError: some gave no answer in time; it names their tasks.
        """
        calls = {call(actor): tasks for tasks, actor in self.actors.items()}
        _, waiting = ray.wait(list(calls), num_returns=len(calls), timeout=self.timeout)
        if waiting:
            raise ClusterError(
                f"{what}: no answer within {self.timeout:g} s about "
                f"{', '.join(calls[one] for one in waiting)}. Run the same command to resume, or "
                "raise resources.timeout_seconds."
            )
        answers, lost = [], {}
        for one, tasks in calls.items():
            try:
                answers.append(ray.get(one))
            except ray.exceptions.RayTaskError:  # of ours, or a bug: its actor lives
                answers.append(fetch(one, f"{what}: {tasks}"))
            except ray.exceptions.RayError as error:
                lost[tasks] = error
        if lost:
            raise lost_work(lost, 0, what)
        return answers


def _learned(
    crew: _Crew, order: LearnOrder, covered: Sequence[str], drawn: Bar
) -> tuple[LearnedMerge, float]:
    """Make every step that is missing; the driver's half of `learn_on_ray`."""
    how, checkpoint = order.plan.spec.optimisation, order.run.checkpoint
    starts = _joined(crew.ask("start", _call("starts")))
    # Only the parameters move here: the objective is the actors'.
    learning = Learning(order.plan.parameters(), objective_of(order.plan.spec.objective, None), how)
    descent = Descent(learning.parameters.tensors(), how)
    if checkpoint:
        descent.resume(checkpoint)
    drawn.reach(descent.step)
    while descent.step < how.steps:
        values, number = ray.put(descent.values()), descent.step
        shares = crew.ask(f"step {number}", _call("step", values, number))
        descent.move([share for mine in shares for share in mine])
        drawn.add()
        if checkpoint and descent.step % how.save_every == 0:
            descent.save(checkpoint)
    values = ray.put(descent.values())
    ends = _joined(crew.ask("end", _call("ends", values)))
    seconds = sum(crew.ask("cost", _call("cpu_seconds")))
    before = {task: starts[task] for task in covered}
    outcome = report(descent, before, {task: ends[task] for task in covered})
    return learned_merge(learning, order.tasks, outcome), seconds


def _call(method: str, *values: Any) -> Callable[[Any], Any]:
    return lambda actor: getattr(actor, method).remote(*values)


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {task: value for part in parts for task, value in part.items()}
