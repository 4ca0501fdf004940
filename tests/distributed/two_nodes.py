"""Gather evidence on a cluster of two nodes, in a process of its own; prints what happened.

python tests/distributed/two_nodes.py BASE ADAPTER ADAPTER
"""

import contextlib
import io
import json
import sys
import threading
from pathlib import Path

import icm_ray.distributed  # noqa: F401  isort: skip
import ray
import torch
from ray.cluster_utils import Cluster

from icm_ray.adapters import load_adapter, open_all
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.shared_base import share_base
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.config import Resources
from icm_ray.distributed.evidence import gather_on_ray
from icm_ray.distributed.session import Pool, Session
from icm_ray.evidence.gather import gather
from icm_ray.suites import SUITES

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 1000,
}


def serial(base_path: Path, refs: list[tuple[str, Path]], texts: list[str]) -> list:
    torch.set_num_threads(1)
    base = load_base(base_path)
    ids = tokenize(base.tokenizer, texts, 24)
    batches = make_batches(ids, 8, base.tokenizer.pad_token_id)
    return [gather(base.model, load_adapter(path, name), batches) for name, path in refs]


def same(found: list, expected: list) -> bool:
    return all(
        torch.equal(one.task_vector, other.task_vector)
        and one.expert_ratios == other.expert_ratios
        and one.base_ratios == other.base_ratios
        for one, other in zip(found, expected, strict=True)
    )


def main(base: Path, folders: list[Path]) -> None:
    texts = SUITES["text"].load("year", "train", 1500).texts
    refs = [(f"task{i}", folder) for i, folder in enumerate(folders)]
    inputs = {name: (texts, 24) for name, _ in refs}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": 200_000_000,
            "_system_config": HEALTH,
            "include_dashboard": False,
        },
    )
    second = cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
    ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
    try:
        files = open_all(refs)
        session = Session(Resources(cpus_per_worker=1, timeout_seconds=300), share_base(base))
        pool = Pool(session, len(files))
        found = gather_on_ray(pool, files, inputs, batch=8)
        where = [
            actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
            for actor in pool.actors
        ]
        nodes = set(ray.get(where, timeout=60))
        expected = serial(base, refs, list(texts))
        print(json.dumps({"nodes": len(nodes), "same": same(found, expected)}), flush=True)
        # A node is lost in the middle; its actor starts again on a third one.
        cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
        lose = threading.Timer(0.5, cluster.remove_node, (second,), {"allow_graceful": False})
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the node's log
            lose.start()
            found = gather_on_ray(pool, files, inputs, batch=8)
            lose.join()
        alive = sum(node["Alive"] for node in ray.nodes())
        print(json.dumps({"nodes": alive, "same": same(found, expected)}), flush=True)
    finally:
        ray.shutdown()
        with contextlib.redirect_stdout(io.StringIO()):
            cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
