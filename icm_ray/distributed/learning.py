"""Learned merging in parallel: one actor a group of tasks, one reduction in a fixed order.

Each step every actor returns the gradient of its tasks' losses; the driver adds them up in the
order of the tasks' names, makes one step and sends the new values out. A group's share depends on
values and step alone, so any number of actors gives the bytes of `learning.learner.learn`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from icm_ray.config import Resources
from icm_ray.distributed.cluster import MAX_RETRIES, fetch, request, worker_count
from icm_ray.distributed.shared_base import SharedBase, rebuild
from icm_ray.errors import ClusterError
from icm_ray.evidence.learned import LearnedMerge
from icm_ray.learning.descent import Descent
from icm_ray.learning.gradients import Part, TaskGradients, TaskLosses
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run, covered_tasks, groups_of, report
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
        run: Seed, threads and what shares a forward pass.
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

    def __init__(
        self, shared: SharedBase, resources: Resources, order: LearnOrder, groups: Sequence[Group]
    ) -> None:
        torch.set_num_threads(order.run.threads)
        base = rebuild(shared, resources)
        mine = {task for group in groups for task in group}
        self.groups, self.threads = groups, order.run.threads
        with kernel_threads(self.threads):
            objective = order.plan.objective(base)
            self.side = TaskGradients(
                base.model,
                order.plan.parameters(),
                objective,
                [task for task in order.tasks if task.name in mine],
                weights=order.plan.optimisation().task_weights(
                    covered_tasks(order.tasks, objective)
                ),
                seed=order.run.seed,
                save_memory=order.run.save_memory,
            )
            self.found = {task: self.side.start(task) for task in sorted(mine)}

    def starts(self) -> dict[str, TaskLosses]:
        """Return what each task's objective says of base, expert and start."""
        return self.found

    def step(self, values: Values, number: int) -> list[Part]:
        """Return losses and gradients of this actor's groups at `values`."""
        with kernel_threads(self.threads):
            self.side.load(values)
            return [self.side.gradient(group, number) for group in self.groups]

    def ends(self, values: Values) -> dict[str, list[float]]:
        """Return each task's components at `values`."""
        with kernel_threads(self.threads):
            self.side.load(values)
            return {task: self.side.components(task) for task in self.found}

    def cpu_seconds(self) -> float:
        """Return the processor time this actor has used so far."""
        return time.process_time()


def learn_on_ray(
    shared: SharedBase,
    order: LearnOrder,
    covered: Sequence[str],
    resources: Resources,
    *,
    origin: Mapping[str, Any],
    scratch: Path,
    key: str,
    label: str,
) -> tuple[LearnedMerge, float]:
    """Return a merge learned over the cluster and its cost; see `learning.learner.learn`.

    The cost is the processor time of all actors in seconds, from the start or the last resumption.

    Args:
        shared: The base.
        order: The run.
        covered: Names of the tasks the objective says something about.
        resources: What each actor gets.
        origin: How it was learned, as plain data.
        scratch: Existing folder for resumable state.
        key: Identifies the run in `scratch`.
        label: Shown by the progress bar.

    Raises:
        ClusterError: an actor died more often than it is restarted, or the time-out passed.
    """
    from ray.experimental import tqdm_ray

    options = order.plan.optimisation()
    groups = list(groups_of(covered, order.run, options))
    count = worker_count(resources, len(groups))
    held, wants = ray.put(order), request(resources)
    kind: Any = TaskActor  # what `ray.remote` returns is not what type checkers see
    actors = [
        kind.options(**wants).remote(shared, resources, held, groups[i::count])
        for i in range(count)
    ]
    timeout = resources.timeout_seconds
    bar = tqdm_ray.tqdm(total=options.steps, desc=f"learn {label}")
    try:
        starts = _joined(_all([a.starts.remote() for a in actors], timeout, "start"))
        parameters = order.plan.parameters()
        descent = Descent(parameters.tensors(), options)
        descent.resume(scratch, key)
        bar.update(descent.step)
        while descent.step < options.steps:
            values = ray.put(descent.values())
            calls = [actor.step.remote(values, descent.step) for actor in actors]
            parts = _all(calls, timeout, f"step {descent.step}")
            descent.move([part for mine in parts for part in mine])
            bar.update(1)
            if descent.step % order.plan.spec.optimisation.save_every == 0:
                descent.save(scratch, key)
        values = ray.put(descent.values())
        ends = _joined(_all([a.ends.remote(values) for a in actors], timeout, "end"))
        seconds = sum(_all([a.cpu_seconds.remote() for a in actors], timeout, "cost"))
    finally:
        bar.close()
        for actor in actors:
            ray.kill(actor)
    before = {task: starts[task] for task in covered}
    told = report(parameters, descent, before, {task: ends[task] for task in covered})
    adapters = {task.name: task.adapter.fingerprint for task in order.tasks}
    learned = parameters.learned()
    return LearnedMerge(learned, parameters.terms.tasks, adapters, dict(origin), told), seconds


def _all(calls: Sequence[Any], timeout: float, what: str) -> list[Any]:
    """Return every result in order; all of them within the time-out."""
    ready, waiting = ray.wait(list(calls), num_returns=len(calls), timeout=timeout)
    if waiting:
        raise ClusterError(
            f"{what}: {len(waiting)} of {len(calls)} actors gave no answer within {timeout:g} s. "
            "Run the same command to resume, or raise resources.timeout_seconds."
        )
    del ready
    return [fetch(call, what) for call in calls]


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {task: value for part in parts for task, value in part.items()}
