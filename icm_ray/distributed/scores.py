"""Score many adapters in parallel; every score is kept by content and never computed twice."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from icm_ray.adapters import AdapterFile
from icm_ray.distributed.actors import AdapterSource, Source
from icm_ray.distributed.faults import LostWork
from icm_ray.distributed.session import Pool
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.metrics import Score
from icm_ray.evaluation.scoring import (
    BATCH,
    Standing,
    TaskData,
    TaskScore,
    standing,
    with_heads,
)
from icm_ray.files import is_done, read_json, sha256_of, whole_folder, write_json
from icm_ray.kinds import REALIGNED

VERSION = 2
BASE, EXPERT = "base", "expert"
"""Labels of the references; an expert's task follows its label."""


@dataclass(frozen=True)
class ScoreItem:
    """One thing to score.

    Attributes:
        label: For messages and progress.
        source: The adapter; None scores the base with the heads alone.
        tasks: Which tasks.
        heads: In place of the experts' own, by task.
    """

    label: str
    source: Source | None
    tasks: tuple[str, ...]
    heads: Mapping[str, Head] = field(default_factory=dict)

    def realigned(self, heads: Mapping[str, Head]) -> "ScoreItem":
        """Return the same read through heads of its own, under a label that says so."""
        return replace(self, label=f"{self.label}{REALIGNED}", heads=heads)

    def key(self, base: str, data: Mapping[str, TaskData], batch: int) -> str:
        """Return what identifies the scores: model, examples, heads and batch size."""
        read = with_heads(data, self.heads)
        return sha256_of(
            {
                "version": VERSION,
                "base": base,
                "adapter": self.source.fingerprint if self.source else None,
                "batch": batch,
                "tasks": {t: _data_key(read[t]) for t in self.tasks if t in read},
            }
        )


def _data_key(item: TaskData) -> list[Any]:
    task, head = item.task, item.head
    how = [task.kind, task.head, task.metric, task.max_tokens, task.max_new_tokens]
    judge = item.expert.fingerprint if item.expert else None
    read = sha256_of(head.described) if head else None
    own = [task.scorer.code] if task.scorer else []
    return [item.examples.fingerprint, [*how, *own], read, judge]


def score_on_ray(
    pool: Pool,
    items: Sequence[ScoreItem],
    data: Mapping[str, TaskData],
    folder: Path,
    batch: int = BATCH,
) -> dict[str, dict[str, TaskScore]]:
    """Return the scores of every item by label; finished ones are read back from `folder`.

    Args:
        pool: Actors that hold the base; none is started if there is nothing to score.
        items: What to score; labels are unique.
        data: Examples and heads by task.
        folder: Scores go to `<folder>/<key>/`; two labels with equal adapters share one.
        batch: Examples a forward.
    """
    keys = {item.label: item.key(pool.session.key, data, batch)[:20] for item in items}
    missing = {
        keys[item.label]: item
        for item in items
        if not is_done(folder / keys[item.label], keys[item.label])
    }
    shared = ray.put(dict(data)) if missing else None
    arguments = {key: (i.source, shared, i.tasks, batch, i.heads) for key, i in missing.items()}

    def keep(key: str, scores: dict[str, TaskScore]) -> None:
        save_scores(folder / key, key, scores)  # at once: a killed run has lost nothing

    try:
        pool.map("scores", arguments, label=f"evaluate {folder.name}", done=keep)
    except LostWork as error:
        error.lost = _blamed(pool, [missing[key] for key in error.lost], shared, batch)
        raise
    return {item.label: load_scores(folder / keys[item.label]) for item in items}


def _blamed(pool: Pool, lost: Sequence[ScoreItem], shared: Any, batch: int) -> dict[Any, str]:
    """Return which tasks, or else which adapters, kill whoever scores them, each with the reason.

    Each of an item's tasks is scored once more by itself. A task is to blame if the base or its
    own expert dies of it, any other adapter if the base does not.
    """
    alone = {
        (item.label, task): (item.source, shared, (task,), batch, item.heads)
        for item in lost
        for task in item.tasks
    }
    pool.close()  # some of its actors are gone for good
    try:
        pool.map("scores", alone)
    except LostWork as error:
        died = error.lost
        tasks = {t: why for (name, t), why in died.items() if name in (BASE, f"{EXPERT} {t}")}
        return tasks or {name: why for (name, _), why in died.items()}
    return {}


def references(experts: Sequence[AdapterFile], unseen: Sequence[str] = ()) -> list[ScoreItem]:
    """Return what other items are measured by: the base, and each expert on its own task.

    The base is scored on tasks without an expert, too.
    """
    base = ScoreItem(BASE, None, (*(file.name for file in experts), *unseen))
    own = (ScoreItem(f"{EXPERT} {f.name}", AdapterSource(f), (f.name,)) for f in experts)
    return [base, *own]


@dataclass(frozen=True)
class Standings:
    """Scores beside those of the references.

    Attributes:
        items: Scores by label and task.
        base: Scores of the base with the heads alone, by task.
        expert: Each expert's score on its own task.
    """

    items: Mapping[str, dict[str, TaskScore]]
    base: dict[str, TaskScore]
    expert: dict[str, TaskScore]

    @classmethod
    def among(cls, scores: Mapping[str, dict[str, TaskScore]]) -> "Standings":
        """Take the scores of `references` out of those of everything."""
        base = scores[BASE]
        expert = {t: scores[f"{EXPERT} {t}"][t] for t in base if f"{EXPERT} {t}" in scores}
        apart = (BASE, *(f"{EXPERT} {task}" for task in expert))
        others = {name: score for name, score in scores.items() if name not in apart}
        return cls(others, base, expert)

    def of(self, label: str) -> Standing:
        """Return where an item stands."""
        return standing(self.items[label], self.expert, self.base)


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
