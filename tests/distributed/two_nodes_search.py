"""Search on a cluster of two nodes, in a process of its own; prints on which nodes trials ran.

python tests/distributed/two_nodes_search.py FOLDER
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import icm_ray.distributed  # noqa: F401  isort: skip
import ray
from ray.cluster_utils import Cluster
from ray_samples import finetune_recipe, save_tiny_bert, session_on

from icm_ray.config import SearchRecipe
from icm_ray.files import read_json
from icm_ray.workflows.experts import find_or_train
from icm_ray.workflows.search.run import run


def main(root: Path) -> None:
    options = {"num_cpus": 1, "object_store_memory": 200_000_000}
    head = {**options, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**options)
    ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
    try:
        base = save_tiny_bert(root / "base")
        train = finetune_recipe(base, root, tasks=["keyword", "supersense"])
        with contextlib.redirect_stdout(io.StringIO()):
            find_or_train(session_on(base), train, root)
            recipe = SearchRecipe(
                base=str(base),
                suite="text",
                experts=str(root / "experts" / "shared-seed0"),
                search={"params.scale": "loguniform(0.05, 2)"},
                validation=24,
                trials=8,
                output=str(root / "out"),
            )
            run(recipe, root / "out")
        trials = [read_json(path) for path in sorted((root / "out" / "trials").glob("*.json"))]
        nodes = {trial["node"] for trial in trials}
        told = {"nodes": len(nodes), "states": [trial["state"] for trial in trials]}
        print(json.dumps(told), flush=True)
    finally:
        ray.shutdown()
        with contextlib.redirect_stdout(io.StringIO()):
            cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
