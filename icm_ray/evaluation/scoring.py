"""Score one adapter on every task of a suite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from icm_ray.adapters import AdapterFile, open_adapter
from icm_ray.base_model.loading import Base
from icm_ray.base_model.low_rank import applied
from icm_ray.evaluation.answers import answer_of
from icm_ray.evaluation.experts import Expert, heads_of
from icm_ray.evaluation.fidelity import Asked, Said, fidelity, said_by
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.metrics import Score, score, share
from icm_ray.kinds import ERRORS
from icm_ray.linalg.threads import kernel_threads
from icm_ray.suites import Suite
from icm_ray.suites.tasks import FIDELITY, Examples, Task
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
        expert: The task's adapter, where a model is scored by what that one says.
    """

    task: Task
    examples: Examples
    head: Head | None
    expert: AdapterFile | None = None

    def asked(self, batch: int) -> Asked:
        """Return what a model is asked, `batch` examples at a time."""
        return Asked(self.task, self.examples, self.head, batch)


def with_heads(data: Mapping[str, TaskData], heads: Mapping[str, Head]) -> dict[str, TaskData]:
    """Return tasks' examples, some of them with other heads."""
    return {t: replace(one, head=heads[t]) if t in heads else one for t, one in data.items()}


@dataclass(frozen=True)
class TaskScore:
    """A task's score and the predictions behind it, for paired comparisons.

    Attributes:
        score: Metric with interval.
        predictions: One row an example, float64; `metrics` says what each kind of task has.
    """

    score: Score
    predictions: np.ndarray


Memory = dict[tuple[str, str, int], Said]
"""What experts said, by expert, examples and batch size; they are asked once."""


def evaluate(
    base: Base,
    adapter: Adapter | None,
    data: Mapping[str, TaskData],
    *,
    batch: int = 64,
    threads: int = 1,
    memory: Memory | None = None,
) -> dict[str, TaskScore]:
    """Return the score of base plus `adapter` on every task; None scores the base alone.

    Args:
        base: The base.
        adapter: The adapter.
        data: Examples and heads by task.
        batch: Examples a forward.
        threads: Kernel threads.
        memory: What experts said, kept from call to call.
    """
    result, memory = {}, {} if memory is None else memory
    with kernel_threads(threads):
        said = {n: _said(base, one, batch, memory) for n, one in data.items() if one.expert}
        with applied(base.model, adapter):
            for name, item in data.items():
                if name in said:
                    predictions = fidelity(base, item.asked(batch), said[name])
                else:
                    predictions = predict(base, item, batch)
                result[name] = TaskScore(
                    score(item.task, predictions, item.examples.targets), predictions
                )
    return result


def _said(base: Base, item: TaskData, batch: int, memory: Memory) -> Said:
    assert item.expert is not None
    key = (item.expert.fingerprint, item.examples.fingerprint, batch)
    if key not in memory:
        with applied(base.model, item.expert.load()):
            memory[key] = said_by(base, item.asked(batch))
    return memory[key]


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
        gain_kept: Share of the expert's gain over the base (same head, adapter off), by task;
            NaN where the expert is no better.
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
    merged: Mapping[str, TaskScore], expert: Mapping[str, TaskScore], base: Mapping[str, TaskScore]
) -> Standing:
    """Compare a merged adapter's scores with its experts' and the base's, task by task.

    A task without an expert has nothing to be compared with.
    """
    return standing_of(
        values(merged),
        values(expert),
        values(base),
        {task: one.score.metric for task, one in merged.items()},
    )


def standing_of(
    merged: Mapping[str, float],
    expert: Mapping[str, float],
    base: Mapping[str, float],
    metrics: Mapping[str, str] | None = None,
) -> Standing:
    """Compare plain scores as `standing` does; `metrics` says which of them are errors."""
    tasks: Sequence[str] = sorted(merged.keys() & expert.keys())
    known = metrics or {}
    normalised = {t: share(merged[t], expert[t], known.get(t, "")) for t in tasks}
    gains = {t: expert[t] - base[t] for t in tasks}
    # An expert that is no better than the base gained nothing that could be kept.
    better = {t: gains[t] < 0 if known.get(t) in ERRORS else gains[t] > 0 for t in tasks}
    kept = {t: (merged[t] - base[t]) / gains[t] if better[t] else math.nan for t in tasks}
    return Standing(normalised, kept)


def idle_lines(expert: Mapping[str, TaskScore], base: Mapping[str, TaskScore]) -> list[str]:
    """Return a line for each expert that is no better than the base."""
    kept = standing(expert, expert, base).gain_kept
    return [
        f"{task}: the expert's {expert[task].score.metric} {expert[task].score.value:.4f} is no "
        f"better than the base's {base[task].score.value:.4f}, so no gain is counted."
        for task, share_kept in kept.items()
        if math.isnan(share_kept)
    ]


def task_data(
    suite: Suite,
    experts: Mapping[str, Expert],
    split: str,
    limit: int | None,
    unseen: Sequence[str] = (),
) -> dict[str, TaskData]:
    """Return each task's examples of a split with its expert's head, and the expert who judges.

    Unseen tasks have neither.
    """
    suite, heads = heads_of(suite, experts)
    data = {}
    for name in [*experts, *unseen]:
        task, expert = suite.task(name), experts.get(name)
        judge = None
        if expert is not None and task.metric == FIDELITY:
            judge = open_adapter(expert.adapter, name, saved_modules="drop")
        data[name] = TaskData(task, suite.load(name, split, limit), heads.get(name), judge)
    return data
