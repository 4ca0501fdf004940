"""How fast the workers that are there are, measured on a few of the tasks' own examples."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from icm_ray.adapters import AdapterFile
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.session import Pool
from icm_ray.evaluation.scoring import BATCH, TaskData
from icm_ray.learning.tasks import Inputs


@dataclass(frozen=True)
class Speed:
    """Seconds of one worker for one example.

    Where answers are decoded, the three differ: an expert ends its answers, a base rarely does.

    Attributes:
        forward: Read by the base once, as evidence and learners do.
        base: Scored through the base alone.
        expert: Scored through its task's own adapter.
    """

    forward: float
    base: float
    expert: float

    @property
    def merge(self) -> float:
        """Scored through a merge, which is somewhere between the two."""
        return (self.base + self.expert) / 2


def speed_of(
    pool: Pool, files: Sequence[AdapterFile], data: Mapping[str, TaskData], inputs: Inputs
) -> Speed:
    """Measure a pool's workers, once they are warm.

    Args:
        pool: Actors that hold the base.
        files: Adapters, each of the task of its name.
        data: A few examples of every task.
        inputs: A few unlabelled inputs of every task.
    """
    shared = ray.put(dict(data))
    base = {task: (None, shared, (task,), BATCH) for task in data}
    experts = {f.name: (AdapterSource(f), shared, (f.name,), BATCH) for f in files}
    # Task vectors run the base and the adapter over each input.
    reads = {f.name: (AdapterSource(f), *inputs[f.name], BATCH) for f in files}
    pool.map("scores", base)  # loads the base
    return Speed(
        _seconds(pool, "evidence", reads) / (2 * sum(len(inputs[f.name][0]) for f in files)),
        _seconds(pool, "scores", base) / sum(len(item.examples) for item in data.values()),
        _seconds(pool, "scores", experts) / sum(len(data[f.name].examples) for f in files),
    )


def _seconds(pool: Pool, work: str, orders: Mapping[str, Any]) -> float:
    """Return what some work takes of one worker, one order after the other."""
    started = time.monotonic()
    for name, order in orders.items():
        pool.map(work, {name: order})
    return time.monotonic() - started
