"""Run out of disk or memory as a job would, and end with the job's exit code.

python tests/distributed/exhausted.py put | return | memory
"""

import sys
import time

# Sets what closes the cluster, so it comes before Ray itself.
import icm_ray.distributed  # noqa: F401  isort: skip
import numpy as np
import ray

from icm_ray.command import guarded
from icm_ray.config import Resources
from icm_ray.distributed.cluster import connected, run_tasks

MEGABYTE = 125_000
"""In float64."""


@ray.remote(max_retries=1)
def large() -> np.ndarray:
    return np.ones(200 * MEGABYTE)


@ray.remote(max_retries=1)
def wait() -> None:
    time.sleep(300)


def work(kind: str) -> dict[str, object]:
    resources = Resources(workers=1)
    with connected(resources):
        if kind == "put":
            held = [ray.put(np.ones(20 * MEGABYTE)) for _ in range(10)]
            assert held
        else:
            run_tasks(wait if kind == "memory" else large, {"a piece": ()}, resources, label="test")
    return {}


if __name__ == "__main__":
    sys.exit(guarded(lambda: work(sys.argv[1]), debug=False)[0])
