"""Metrics with bootstrap confidence intervals.

Every metric is a function of weighted sums over examples. A row of weights is one resample: all
ones for the point estimate, multinomial counts for a bootstrap. So one matrix product scores a
thousand resamples. What a task's answers are reduced to, one row an example, are its predictions:

classification, regression  class index or number, `(examples,)`
dense_*                     the same for each patch, `(examples, patches)`
detection                   boxes, as `detection.decoded` has them, `(examples, 6 * most)`
language_modelling          summed negative log-likelihood in nats, tokens it is over, characters
                            they stand for, `(examples, 3)`
generation                  score of each answer in [0, 1], `(examples,)`; of a metric of the whole
                            corpus its statistics
multiple_choice             index of the choice, `(examples,)`

and what `fidelity` leaves of them, where that is the metric.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from icm_ray.evaluation.average_precision import mean_average_precision
from icm_ray.evaluation.corpus import CORPUS, corpus_scores
from icm_ray.kinds import ERRORS
from icm_ray.seeding import seed_for
from icm_ray.suites.tasks import FIDELITY, Task

RESAMPLES = 1000
CONFIDENCE = 0.95
TINY = 1e-12


@dataclass(frozen=True)
class Score:
    """A task's score with its confidence interval over test examples.

    Attributes:
        metric: The task's metric, one of `icm_ray.suites.tasks.METRICS`.
        value: The score; 1 is perfect, and of an error 0.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end.
        spearman: Rank correlation in [-1, 1] for regressions, else None. It forgives a shifted or
            stretched scale, which is half of what merging does to a regression.
        details: Other measures of the same answers, by name.
    """

    metric: str
    value: float
    low: float
    high: float
    spearman: float | None
    details: Mapping[str, float] = field(default_factory=dict)


def score(task: Task, predictions: np.ndarray, targets: np.ndarray) -> Score:
    """Score predictions of one task.

    Args:
        task: Says which metric.
        predictions: One row an example, as the head of this module says.
        targets: Class indices or numbers of the same shape; not looked at where the predictions
            are measures already.
    """
    ones = np.ones((1, len(targets)))
    value = float(weighted(task, predictions, targets, ones)[0])
    resampled = weighted(task, predictions, targets, _resamples(len(targets)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    plain = task.metric not in (FIDELITY, *CORPUS) and task.scorer is None
    ranked = plain and task.kind == "regression"
    spearman = rank_correlation(predictions, targets) if ranked else None
    more = DETAILS.get(task.kind) if plain else None
    details = more(predictions, targets) if more else {}
    return Score(task.metric, value, float(low), float(high), spearman, details)


def weighted(
    task: Task, predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return the task's metric once for each row of `weights`, shape `(rows,)`."""
    if task.metric == FIDELITY and task.kind == "regression":
        return _r2(predictions[:, 0], predictions[:, 1], weights, 0)
    if task.scorer is not None:
        return _mean(_own_scores(task, predictions, targets), targets, weights, 0)
    return MEASURES[task.metric](predictions, targets, weights, len(task.classes))


def _own_scores(task: Task, predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return what the task's own scorer says of each answer; generations have been judged."""
    assert task.scorer is not None
    if task.kind == "generation":
        return predictions
    names = (lambda x: task.classes[int(x)]) if task.classes else int if task.is_class else float
    pairs = zip(predictions.tolist(), targets.tolist(), strict=True)
    return np.array([task.scorer(names(said), names(right)) for said, right in pairs])


def share(value: float, unit: float, metric: str) -> float:
    """Return a score over another one, the expert's; of an error, the other over it."""
    over, under = (unit, value) if metric in ERRORS else (value, unit)
    return over / under if under > 0 else math.nan


def difference_interval(
    task: Task, ours: np.ndarray, theirs: np.ndarray, targets: np.ndarray
) -> tuple[float, float]:
    """Return the 95 % paired bootstrap interval of `score(ours) - score(theirs)`."""
    weights = _resamples(len(targets))
    gap = weighted(task, ours, targets, weights) - weighted(task, theirs, targets, weights)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(gap, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Answers:
    """Two models' answers to the same examples of one task.

    Attributes:
        task: The task.
        ours: `(examples,)` predictions.
        theirs: The other model's.
        targets: The truth.
        unit: What a difference of scores is divided by: the expert's score.
    """

    task: Task
    ours: np.ndarray
    theirs: np.ndarray
    targets: np.ndarray
    unit: float


def mean_difference(answers: Sequence[Answers]) -> tuple[float, float, float]:
    """Return the mean over tasks of `(ours - theirs) / unit`, and its paired 95 % interval.

    Every task's examples are drawn for themselves, and answers of several models to one task on
    the same draws: tests that share their examples do not count as more of them.
    """
    gaps, points = [], []
    for one in answers:
        count = len(one.targets)
        rows = np.concatenate([np.ones((1, count)), _resamples(count, one.task.name)])
        ours, theirs = (weighted(one.task, p, one.targets, rows) for p in (one.ours, one.theirs))
        if one.task.metric in ERRORS:  # as `share` has it
            change = one.unit / np.maximum(ours, TINY) - one.unit / np.maximum(theirs, TINY)
        else:
            change = (ours - theirs) / one.unit
        points.append(change[0])
        gaps.append(change[1:])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.mean(gaps, axis=0), [tail, 100 - tail])
    return float(np.mean(points)), float(low), float(high)


def rank_correlation(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return Spearman's rank correlation; 0 where one side is constant."""
    from scipy.stats import rankdata  # .3 s that few commands need

    ranks = [rankdata(predictions), rankdata(targets)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum())
    return float(centred[0] @ centred[1] / scale) if scale else 0.0


def _resamples(examples: int, *key: str) -> np.ndarray:
    # The same resamples for every method, so that intervals of two methods are comparable.
    draw = np.random.default_rng(seed_for("bootstrap", examples, *key))
    return draw.multinomial(examples, np.full(examples, 1 / examples), RESAMPLES).astype(float)


def _macro_f1(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    predicted, actual = p[:, None] == np.arange(classes), t[:, None] == np.arange(classes)
    hits = weights @ (predicted & actual)
    both = weights @ predicted + weights @ actual
    f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    # A class that is neither present nor predicted says nothing; it is left out of the mean.
    return f1.sum(1) / np.maximum((both > 0).sum(1), 1)


def _accuracy(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    right = (p == t).reshape(len(p), -1).mean(1)
    return weights @ right / weights.sum(1)


def _r2(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    p, t = p.reshape(len(p), -1), t.reshape(len(t), -1)
    count = weights.sum(1) * t.shape[1]
    p, t = p - t.mean(), t - t.mean()  # a difference of squares far from zero would lose digits
    squared_error = weights @ np.square(t - p).sum(1)
    spread = weights @ np.square(t).sum(1) - np.square(weights @ t.sum(1)) / count
    return 1 - squared_error / np.maximum(spread, TINY)


def _rmse(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    squares = np.square(p - t).reshape(len(p), -1).mean(1)
    return np.sqrt(weights @ squares / weights.sum(1))


def _fidelity(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    if p.ndim == 1:
        return weights @ p / weights.sum(1)
    sums, places = (weights @ p).T
    return sums / np.maximum(places, 1)


def _miou(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    predicted, actual = p[..., None] == np.arange(classes), t[..., None] == np.arange(classes)
    shared = weights @ (predicted & actual).sum(1)
    both = weights @ (predicted | actual).sum(1)
    ratio = np.divide(shared, both, out=np.zeros_like(both), where=both > 0)
    return ratio.sum(1) / np.maximum((both > 0).sum(1), 1)


def _mean(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    return weights @ p / weights.sum(1)


def _likelihood(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    nats, tokens, _ = (weights @ p).T
    return np.exp(-nats / tokens)


def _of_text(p: np.ndarray, t: np.ndarray) -> dict[str, float]:
    nats, tokens, characters = p.sum(0)
    return {
        "perplexity": float(np.exp(nats / tokens)),
        "bits_per_character": float(nats / np.log(2) / characters),
    }


def _of_answers(p: np.ndarray, t: np.ndarray) -> dict[str, float]:
    return {"exact_match": float((p == 1).mean())}


def _of_map(p: np.ndarray, t: np.ndarray) -> dict[str, float]:
    return {"rmse": float(np.sqrt(np.square(p - t).mean()))}


def _of_boxes(p: np.ndarray, t: np.ndarray) -> dict[str, float]:
    return {"map": float(_map(p, t, np.ones((1, len(t))), 0)[0])}


def _map50(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    return mean_average_precision(p, t, weights, [0.5])


def _map(p: np.ndarray, t: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    return mean_average_precision(p, t, weights, np.linspace(0.5, 0.95, 10).tolist())


MEASURES: Mapping[str, Callable[..., np.ndarray]] = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "r2": _r2,
    "miou": _miou,
    "map50": _map50,
    "map": _map,
    "token_likelihood": _likelihood,
    "exact_match": _mean,
    "edit_match": _mean,
    "rouge_l": _mean,
    "pair_f1": _mean,
    "rmse": _rmse,
    FIDELITY: _fidelity,
    "bleu": lambda p, _t, weights, _classes: corpus_scores("bleu", p, weights),
    "chrf": lambda p, _t, weights, _classes: corpus_scores("chrf", p, weights),
}
"""Each metric: predictions, targets, `(resamples, examples)` weights, classes -> `(resamples,)`."""

DETAILS: Mapping[str, Callable[..., dict[str, float]]] = {
    "language_modelling": _of_text,
    "generation": _of_answers,
    "dense_regression": _of_map,
    "detection": _of_boxes,
}
"""By kind: what is shown beside the score."""
