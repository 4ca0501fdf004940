"""Start a local Ray as a job does, and print every address that it listens on, and its token.

python tests/distributed/listening.py
"""

import json
import os
import time

# Sets what closes the cluster, so it comes before Ray itself.
import icm_ray.distributed  # noqa: F401  isort: skip
import psutil
import ray

from icm_ray.config import Resources
from icm_ray.distributed.cluster import connected

EXPECTED = 9
"""Driver, GCS, raylet twice, two agents (one also exports metrics), and two workers."""


def sockets() -> list[tuple[str, str]]:
    """Return name and address of every listening socket of this process and its children."""
    everyone = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return [
        (process.name(), connection.laddr.ip)
        for process in everyone
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]


if __name__ == "__main__":
    with connected(Resources(workers=2)):
        wait = ray.remote(num_cpus=0.5)(lambda: time.sleep(1.0))
        ray.get([wait.remote() for _ in range(2)])
        deadline = time.monotonic() + 60
        while len(sockets()) < EXPECTED and time.monotonic() < deadline:
            time.sleep(0.5)
        time.sleep(2.0)
        print(json.dumps({"sockets": sockets(), "mode": os.environ["RAY_AUTH_MODE"]}))
