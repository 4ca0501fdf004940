"""Refitted linear probes in parallel: the bar every expert has to clear, and where it starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from icm_ray.base_model.low_rank import applied
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.cluster import run_tasks
from icm_ray.distributed.faults import MAX_RETRIES, blaming
from icm_ray.distributed.progress import bar
from icm_ray.distributed.session import Session
from icm_ray.evaluation.answers import headed
from icm_ray.evaluation.experts import HEAD
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.probe import fit_probe
from icm_ray.evaluation.scoring import BATCH
from icm_ray.files import is_done, sha256_of, whole_folder
from icm_ray.linalg.threads import kernel_threads
from icm_ray.suites import Examples, Task

VERSION = 1
PREDICTIONS = "predictions.parquet"


@dataclass(frozen=True)
class ProbeOrder:
    """One probe to fit.

    Attributes:
        task: What it predicts.
        splits: Examples to train on, to choose its strength with, and to predict: "train",
            "validation" and "test".
        adapter: What the base carries while it reads them, if anything.
    """

    task: Task
    splits: Mapping[str, Examples]
    adapter: AdapterSource | None = None

    def key(self, base: str) -> str:
        """Return what identifies the probe on a base."""
        carried = [self.adapter.fingerprint] if self.adapter else []
        splits = {name: one.fingerprint for name, one in self.splits.items()}
        return sha256_of([VERSION, base, splits, *carried])


def fit_probes(session: Session, orders: Mapping[Path, ProbeOrder]) -> None:
    """Fit every probe whose folder is not there yet: its head, and its test predictions."""
    keys = {folder: order.key(session.key) for folder, order in orders.items()}
    arguments = {
        folder: (session, order, folder, keys[folder])
        for folder, order in orders.items()
        if not is_done(folder, keys[folder])
    }
    with blaming(lambda folder: [orders[folder].task.name]):
        run_tasks(_fit, arguments, session.resources)


def read_probe(folder: Path) -> tuple[Head, np.ndarray]:
    """Return a probe's head and its predictions on the test split."""
    table = pq.read_table(folder / PREDICTIONS)
    return Head.load(folder / HEAD), np.array(table["prediction"].to_pylist(), dtype=np.float64)


@ray.remote(max_retries=MAX_RETRIES)
def _fit(session: Session, order: ProbeOrder, folder: Path, key: str) -> None:
    task, answer, seen, read = order.task, headed(order.task), {}, {}
    with (
        bar(len(order.splits), f"probe {task.name}") as drawn,
        kernel_threads(session.resources.threads),
    ):
        base = session.load_base()
        with applied(base.model, order.adapter.load() if order.adapter else None):
            for name, examples in order.splits.items():
                seen[name] = answer.features(base, examples, task, BATCH)
                read[name] = (seen[name].flatten(0, -2), answer.labels(base, examples, task))
                drawn.add()
        head = fit_probe(task, read["train"], read["validation"])
    with whole_folder(folder, info={"key": key, "task": task.name}) as target:
        head.save(target / HEAD)
        predictions = answer.said(base, head, seen["test"], order.splits["test"], task)
        pq.write_table(pa.table({"prediction": predictions.tolist()}), target / PREDICTIONS)
