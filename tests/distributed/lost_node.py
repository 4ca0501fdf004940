"""Lose a node halfway through jobs, on a cluster in a process of its own; prints what came of it.

python tests/distributed/lost_node.py FOLDER merge learn search train_fusion
"""

import contextlib
import importlib
import io
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import icm_ray.distributed  # noqa: F401  isort: skip
import ray
from job_runs import DATA, TASKS, recipe_of_job, wide_adapters
from ray.cluster_utils import Cluster
from ray_samples import hashes, save_peft, save_tiny_bert

from icm_ray import config
from icm_ray.errors import ClusterError

NODE = {"num_cpus": 1, "object_store_memory": 200_000_000}
HEALTH = {"health_check_initial_delay_ms": 30_000, "health_check_timeout_ms": 10_000}
"""A busy machine must not lose nodes by itself; of a killed one the broken connection tells."""
KINDS = {
    "merge": config.MergeRecipe,
    "learn": config.LearnRecipe,
    "search": config.SearchRecipe,
    "train_fusion": config.TrainFusionRecipe,
}


def recipe_for(job: str, root: Path, out: Path) -> Any:
    """Return a recipe whose two workers take a node each; adapters are random, none has a head."""
    base, wide = root / "base", {path.name: path for path in sorted((root / "wide").iterdir())}
    plain = recipe_of_job(job, out, base, root / "none", wide)
    refs = [{"name": task, "path": str(root / task)} for task in TASKS]
    changes: dict[str, Any] = {"resources": {"workers": 2, "cpus_per_worker": 1}}
    if job != "merge":
        changes["adapters"] = refs
    if job == "search":
        changes |= {"data": DATA, "objectives": ["task_vector_match"], "suite": None}
        changes |= {"experts": None}
    if job == "train_fusion":
        changes["trajectories"] = None
    plain = {key: value for key, value in {**plain, **changes}.items() if value is not None}
    return KINDS[job].model_validate(plain)


def run(job: str, root: Path, name: str) -> tuple[float, dict[str, str]]:
    """Run a job on the open cluster; return how long it took and what it made.

    A search's trial that is lost ends it with how to go on, and is made by the next run.
    """
    started, out = time.monotonic(), root / name / job
    room = "search.run" if job == "search" else job
    work = importlib.import_module(f"icm_ray.workflows.{room}").run
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            work(recipe_for(job, root, out), out)
        except ClusterError as error:
            if job != "search" or "run the same command again" not in str(error):
                raise
            work(recipe_for(job, root, out), out)
    return time.monotonic() - started, hashes(out / "adapter" if job == "search" else out)


def main(root: Path, jobs: list[str]) -> None:
    base = save_tiny_bert(root / "base")
    for seed, task in enumerate(TASKS):
        save_peft(base, root / task, seed, r=2, target_modules=["query", "value"])
    wide_adapters(root / "wide", 3)
    head = {**NODE, "_system_config": HEALTH, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    victim = cluster.add_node(**NODE)
    ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
    try:
        for job in jobs:
            seconds, expected = run(job, root, "quiet")
            spare = cluster.add_node(**NODE)
            lose = threading.Timer(
                seconds / 2, cluster.remove_node, (victim,), {"allow_graceful": False}
            )
            lose.start()
            longer, found = run(job, root, "lost")
            lose.join()
            told = {"job": job, "same": found == expected, "quiet": seconds, "lost": longer}
            print(json.dumps(told), flush=True)
            victim = spare
    finally:
        ray.shutdown()
        with contextlib.redirect_stdout(io.StringIO()):
            cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
