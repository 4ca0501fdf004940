"""Score many adapters in parallel; every score is kept by content and never computed twice."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from icm_ray.distributed.actors import AdapterSource, MergeSource
from icm_ray.distributed.cluster import run_bounded
from icm_ray.evaluation.metrics import Score
from icm_ray.evaluation.scoring import TaskData, TaskScore
from icm_ray.files import is_done, read_json, sha256_of, whole_folder, write_json

VERSION = 1


@dataclass(frozen=True)
class ScoreItem:
    """One thing to score.

    Attributes:
        label: For messages and progress.
        source: The adapter; None scores the base with the heads alone.
        tasks: Which tasks.
    """

    label: str
    source: AdapterSource | MergeSource | None
    tasks: tuple[str, ...]

    def key(self, base: str, data: Mapping[str, TaskData], batch: int) -> str:
        """Return what identifies the scores: model, examples, heads and batch size."""
        return sha256_of(
            {
                "version": VERSION,
                "base": base,
                "adapter": self.source.fingerprint if self.source else None,
                "batch": batch,
                "tasks": {task: _data_key(data[task]) for task in self.tasks},
            }
        )


def _data_key(item: TaskData) -> list[Any]:
    if item.head is None:
        task = item.task
        how = [task.kind, task.metric, task.max_tokens, task.max_new_tokens]
        return [item.examples.fingerprint, how]
    head = [item.head.weight, item.head.bias]
    digest = sha256_of([t.numpy().tobytes().hex() for t in head] + [item.head.mean, item.head.std])
    return [item.examples.fingerprint, digest]


def score_on_ray(
    actors: Sequence[Any],
    items: Sequence[ScoreItem],
    data: Mapping[str, TaskData],
    folder: Path,
    *,
    base: str,
    batch: int,
    timeout: float,
) -> dict[str, dict[str, TaskScore]]:
    """Return the scores of every item by label; finished ones are read back from `folder`.

    Args:
        actors: Pool that holds the base.
        items: What to score; labels are unique.
        data: Examples and heads by task.
        folder: Scores go to `<folder>/<key>/`; two labels with equal adapters share one.
        base: Fingerprint of the base.
        batch: Examples a forward.
        timeout: Longest wait for one item, seconds.
    """
    from ray.experimental import tqdm_ray

    keys = {item.label: item.key(base, data, batch)[:20] for item in items}
    missing = {
        keys[item.label]: item
        for item in items
        if not is_done(folder / keys[item.label], keys[item.label])
    }
    if not missing:  # an empty bar would stay on the terminal
        return {item.label: load_scores(folder / keys[item.label]) for item in items}
    shared = ray.put(dict(data))
    bar = tqdm_ray.tqdm(total=len(missing), desc=f"evaluate {folder.name}")

    def call(item: ScoreItem) -> Any:
        return lambda actor: actor.scores.remote(item.source, shared, item.tasks, batch)

    def keep(key: str, scores: dict[str, TaskScore]) -> None:
        save_scores(folder / key, key, scores)  # at once: a killed run has lost nothing
        bar.update(1)

    calls = {key: call(item) for key, item in missing.items()}
    run_bounded(actors, calls, timeout=timeout, done=keep)
    bar.close()
    return {item.label: load_scores(folder / keys[item.label]) for item in items}


def is_scored(
    items: Sequence[ScoreItem],
    data: Mapping[str, TaskData],
    folder: Path,
    *,
    base: str,
    batch: int,
) -> bool:
    """Say whether `score_on_ray` would only read, so that no actor has to be started for it."""
    keys = [item.key(base, data, batch)[:20] for item in items]
    return all(is_done(folder / key, key) for key in keys)


def save_scores(folder: Path, key: str, scores: Mapping[str, TaskScore]) -> None:
    """Write scores as JSON and the predictions behind them as Parquet, whole or not at all."""
    with whole_folder(folder, info={"key": key}) as target:
        write_json(target / "scores.json", {t: asdict(s.score) for t, s in scores.items()})
        tasks = [task for task, s in scores.items() for _ in s.predictions]
        if all(s.predictions.ndim == 1 for s in scores.values()):
            rows = [p for s in scores.values() for p in s.predictions.tolist()]
        else:  # some have several numbers an example, and a column has one type
            rows = [np.atleast_1d(p).tolist() for s in scores.values() for p in s.predictions]
        columns = {"task": tasks, "prediction": rows}
        pq.write_table(pa.table(columns), target / "predictions.parquet", compression="zstd")


def load_scores(folder: Path) -> dict[str, TaskScore]:
    """Read scores back."""
    table = pq.read_table(folder / "predictions.parquet")
    rows: dict[str, list[Any]] = {}
    for task, row in zip(table["task"].to_pylist(), table["prediction"].to_pylist(), strict=True):
        rows.setdefault(task, []).append(row)
    return {
        task: TaskScore(Score(**values), _unboxed(np.array(rows[task], dtype=np.float64)))
        for task, values in read_json(folder / "scores.json").items()
    }


def _unboxed(predictions: np.ndarray) -> np.ndarray:
    """Return one number an example as a vector, beside whatever it was written."""
    one = predictions.ndim == 2 and predictions.shape[1] == 1
    return predictions[:, 0] if one else predictions
