"""Metrics with bootstrap confidence intervals.

Every metric is a function of weighted sums over examples. A row of weights is one resample: all
ones for the point estimate, multinomial counts for a bootstrap. So one matrix product scores a
thousand resamples.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from icm_ray.seeding import seed_for
from icm_ray.suites.tasks import Task

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A task's score with its confidence interval over test examples.

    Attributes:
        metric: "accuracy", "macro_f1" or "r2".
        value: The score; 1 is perfect.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end.
        spearman: Rank correlation in [-1, 1] for regressions, else None. It forgives a shifted or
            stretched scale, which is half of what merging does to a regression.
    """

    metric: str
    value: float
    low: float
    high: float
    spearman: float | None


def score(task: Task, predictions: np.ndarray, targets: np.ndarray) -> Score:
    """Score predictions of one task.

    Args:
        task: Says which metric.
        predictions: `(examples,)`: class index or number.
        targets: `(examples,)`, the same.
    """
    ones = np.ones((1, len(targets)))
    value = float(weighted(task, predictions, targets, ones)[0])
    resampled = weighted(task, predictions, targets, _resamples(len(targets)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    spearman = rank_correlation(predictions, targets) if task.kind == "regression" else None
    return Score(task.metric, value, float(low), float(high), spearman)


def weighted(
    task: Task, predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return the task's metric once for each row of `weights`, shape `(rows,)`."""
    if task.metric == "accuracy":
        return weights @ (predictions == targets) / weights.sum(1)
    if task.metric == "macro_f1":
        return _macro_f1(predictions, targets, weights, len(task.classes))
    return _r2(predictions, targets, weights)


def difference_interval(
    task: Task, ours: np.ndarray, theirs: np.ndarray, targets: np.ndarray
) -> tuple[float, float]:
    """Return the 95 % paired bootstrap interval of `score(ours) - score(theirs)`."""
    weights = _resamples(len(targets))
    gap = weighted(task, ours, targets, weights) - weighted(task, theirs, targets, weights)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(gap, [tail, 100 - tail])
    return float(low), float(high)


def rank_correlation(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return Spearman's rank correlation; 0 where one side is constant."""
    ranks = [rankdata(predictions), rankdata(targets)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum())
    return float(centred[0] @ centred[1] / scale) if scale else 0.0


def _resamples(examples: int) -> np.ndarray:
    # The same resamples for every method, so that intervals of two methods are comparable.
    draw = np.random.default_rng(seed_for("bootstrap", examples))
    return draw.multinomial(examples, np.full(examples, 1 / examples), RESAMPLES).astype(float)


def _macro_f1(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    predicted, actual = p[:, None] == np.arange(classes), t[:, None] == np.arange(classes)
    hits = weights @ (predicted & actual)
    both = weights @ predicted + weights @ actual
    f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    # A class that is neither present nor predicted says nothing; it is left out of the mean.
    return f1.sum(1) / np.maximum((both > 0).sum(1), 1)


def _r2(p: np.ndarray, t: np.ndarray, weights: np.ndarray) -> np.ndarray:
    count = weights.sum(1)
    p, t = p - t.mean(), t - t.mean()  # a difference of squares far from zero would lose digits
    squared_error = weights @ np.square(t - p)
    spread = weights @ np.square(t) - np.square(weights @ t) / count
    return 1 - squared_error / np.maximum(spread, 1e-12)
