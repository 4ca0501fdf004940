"""Score one adapter on every task of a suite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from icm_ray.base_model.loading import Base
from icm_ray.base_model.low_rank import applied
from icm_ray.evaluation.answers import answer_of
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.metrics import Score, score
from icm_ray.linalg.threads import kernel_threads
from icm_ray.suites import Suite
from icm_ray.suites.tasks import Examples, Task
from icm_ray.types import Adapter

BATCH = 64
"""Examples a forward, unless a recipe says otherwise."""


@dataclass(frozen=True)
class TaskData:
    """One task's examples of one split, with the expert's head.

    Attributes:
        task: The task.
        examples: Inputs and targets or answers.
        head: The frozen head that reads the features; None if the base answers by itself.
    """

    task: Task
    examples: Examples
    head: Head | None


@dataclass(frozen=True)
class TaskScore:
    """A task's score and the predictions behind it, for paired comparisons.

    Attributes:
        score: Metric with interval.
        predictions: One row an example, float64; `metrics` says what each kind of task has.
    """

    score: Score
    predictions: np.ndarray


def evaluate(
    base: Base,
    adapter: Adapter | None,
    data: Mapping[str, TaskData],
    *,
    batch: int = 64,
    threads: int = 1,
) -> dict[str, TaskScore]:
    """Return the score of base plus `adapter` on every task; None scores the base alone."""
    result = {}
    with kernel_threads(threads), applied(base.model, adapter):
        for name, item in data.items():
            predictions = predict(base, item, batch)
            result[name] = TaskScore(
                score(item.task, predictions, item.examples.targets), predictions
            )
    return result


def predict(base: Base, item: TaskData, batch: int) -> np.ndarray:
    """Return the predictions of the model as it stands, one row an example."""
    return answer_of(item.task).predict(base, item.head, item.examples, item.task, batch)


def values(scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """Return the plain score of each task."""
    return {task: item.score.value for task, item in scores.items()}


@dataclass(frozen=True)
class Standing:
    """Where a merged adapter stands between the base and the experts.

    Attributes:
        normalised: Score over the expert's score, by task; 1 is as good as the expert.
        gain_kept: Share of the expert's gain over the base (same head, adapter off), by task.
    """

    normalised: Mapping[str, float]
    gain_kept: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean normalised score."""
        return sum(self.normalised.values()) / len(self.normalised)

    @property
    def worst(self) -> float:
        """Lowest normalised score of any task."""
        return min(self.normalised.values())


def standing(
    merged: Mapping[str, float], expert: Mapping[str, float], base: Mapping[str, float]
) -> Standing:
    """Compare a merged adapter's scores with its experts' and the base's, task by task.

    A task without an expert has nothing to be compared with.
    """
    tasks: Sequence[str] = sorted(merged.keys() & expert.keys())
    normalised = {t: merged[t] / expert[t] if expert[t] > 0 else float("nan") for t in tasks}
    gains = {t: expert[t] - base[t] for t in tasks}
    kept = {t: (merged[t] - base[t]) / gains[t] if gains[t] else float("nan") for t in tasks}
    return Standing(normalised, kept)


def task_data(
    suite: Suite,
    experts: Mapping[str, Expert],
    split: str,
    limit: int,
    unseen: Sequence[str] = (),
) -> dict[str, TaskData]:
    """Return each task's examples of a split with its expert's head; unseen ones have none."""
    heads = {task: expert.head() for task, expert in experts.items()} | dict.fromkeys(unseen)
    return {
        task: TaskData(suite.tasks[task], suite.load(task, split, limit), head)
        for task, head in heads.items()
    }
