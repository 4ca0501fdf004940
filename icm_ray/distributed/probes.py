"""Refitted linear probes in parallel: the bar every expert has to clear, and where it starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from icm_ray.config import Resources, Sizes, Training
from icm_ray.distributed.cluster import MAX_RETRIES, request, run_bounded, worker_count
from icm_ray.distributed.shared_base import SharedBase, rebuild
from icm_ray.evaluation.answers import head_features
from icm_ray.evaluation.experts import HEAD
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.probe import fit_probe
from icm_ray.files import is_done, sha256_of, whole_folder
from icm_ray.linalg.threads import kernel_threads
from icm_ray.suites import Examples, Suite, Task

BATCH = 64
VERSION = 1
PREDICTIONS = "predictions.parquet"


def fit_probes(
    suite: Suite,
    tasks: list[str],
    training: Training,
    sizes: Sizes,
    shared: SharedBase,
    resources: Resources,
    root: Path,
) -> dict[str, Path]:
    """Fit every probe that is not there yet; return folders with head and test predictions.

    Each probe sees the same training examples as its task's expert.
    """
    limits = {
        "train": training.train_examples,
        "validation": sizes.validation,
        "test": sizes.test,
    }
    folders = {task: root / "probes" / task for task in tasks}
    calls: dict[str, Any] = {}
    for task in tasks:
        splits = {name: suite.load(task, name, limit) for name, limit in limits.items()}
        prints = {name: examples.fingerprint for name, examples in splits.items()}
        key = sha256_of([VERSION, shared.run_as(resources), prints])
        if not is_done(folders[task], key):
            calls[task] = _call(shared, suite.tasks[task], splits, resources, folders[task], key)
    slots = [None] * worker_count(resources, max(len(calls), 1))
    run_bounded(slots, calls, timeout=resources.timeout_seconds)
    return folders


def read_probe(folder: Path) -> tuple[Head, np.ndarray]:
    """Return a probe's head and its predictions on the test split."""
    table = pq.read_table(folder / PREDICTIONS)
    return Head.load(folder / HEAD), np.array(table["prediction"].to_pylist(), dtype=np.float64)


def _call(
    shared: SharedBase,
    task: Task,
    splits: Mapping[str, Examples],
    resources: Resources,
    folder: Path,
    key: str,
) -> Any:
    remote = _fit.options(**request(resources))
    return lambda _slot: remote.remote(shared, task, splits, resources, folder, key)


@ray.remote(max_retries=MAX_RETRIES)
def _fit(
    shared: SharedBase,
    task: Task,
    splits: Mapping[str, Examples],
    resources: Resources,
    folder: Path,
    key: str,
) -> None:
    from ray.experimental import tqdm_ray

    bar = tqdm_ray.tqdm(total=len(splits), desc=f"probe {task.name}")
    with kernel_threads(resources.threads):
        base = rebuild(shared, resources)
        found = {}
        for name, examples in splits.items():
            found[name] = (head_features(base, examples, task, BATCH), examples.targets.flatten())
            bar.update(1)
        head = fit_probe(task, found["train"], found["validation"])
    bar.close()
    with whole_folder(folder, info={"key": key, "task": task.name}) as target:
        head.save(target / HEAD)
        predictions = head.predict(found["test"][0], task).reshape(splits["test"].targets.shape)
        pq.write_table(pa.table({"prediction": predictions.tolist()}), target / PREDICTIONS)
