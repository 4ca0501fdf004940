"""Metrics against sklearn and scipy, and intervals that are sane and repeat."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from icm_ray.evaluation.metrics import (
    RESAMPLES,
    difference_interval,
    rank_correlation,
    score,
    weighted,
)
from icm_ray.suites.tasks import Task


def make_task(metric: str, classes: int = 0) -> Task:
    kind = "classification" if classes else "regression"
    names = tuple(map(str, range(classes)))
    return Task("t", kind, metric, names, 16, "nowhere", "none")


ACCURACY, F1, R2 = make_task("accuracy", 4), make_task("macro_f1", 4), make_task("r2")


def draws(task: Task, n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predictions, targets and rows of resample counts."""
    draw = np.random.default_rng(seed)
    if task.classes:
        targets = draw.integers(0, 4, n).astype(float)
        predictions = np.where(draw.random(n) < 0.6, targets, draw.integers(0, 4, n)).astype(float)
    else:
        targets = draw.normal(1900, 20, n)
        predictions = targets + draw.normal(0, 10, n)
    counts = draw.multinomial(n, np.full(n, 1 / n), 8).astype(float)
    return predictions, targets, np.concatenate([np.ones((1, n)), counts])


def reference(task: Task, p: np.ndarray, t: np.ndarray, counts: np.ndarray) -> float:
    rows = np.repeat(np.arange(len(t)), counts.astype(int))
    if task.metric == "accuracy":
        return float(sk.accuracy_score(t[rows], p[rows]))
    if task.metric == "macro_f1":
        return float(sk.f1_score(t[rows], p[rows], average="macro"))
    return float(sk.r2_score(t[rows], p[rows]))


@pytest.mark.parametrize("task", [ACCURACY, F1, R2], ids=lambda task: task.metric)
@pytest.mark.parametrize("n", [5, 60])
def test_weighted_metrics_equal_sklearn_on_every_resample(task: Task, n: int) -> None:
    predictions, targets, counts = draws(task, n)
    ours = weighted(task, predictions, targets, counts)
    theirs = [reference(task, predictions, targets, row) for row in counts]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_macro_f1_leaves_out_classes_that_nobody_names() -> None:
    predictions, targets = np.array([0.0, 1, 1]), np.array([0.0, 1, 0])
    ones = np.ones((1, 3))
    assert weighted(F1, predictions, targets, ones)[0] == pytest.approx((2 / 3 + 2 / 3) / 2)
    never_right = weighted(F1, np.array([2.0, 2, 2]), targets, ones)[0]
    assert never_right == 0.0


def test_r2_keeps_its_digits_far_from_zero() -> None:
    predictions, targets, counts = draws(R2)
    near, far = (weighted(R2, predictions + by, targets + by, counts) for by in (0.0, 1e9))
    np.testing.assert_allclose(far, near, rtol=1e-5)


def test_a_constant_target_gives_a_number() -> None:
    assert np.isfinite(weighted(R2, np.ones(3), np.ones(3), np.ones((1, 3)))).all()


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation_equals_scipy(seed: int) -> None:
    draw = np.random.default_rng(seed)
    ours, theirs = draw.integers(0, 9, 40).astype(float), draw.normal(size=40)  # with ties
    assert rank_correlation(ours, theirs) == pytest.approx(stats.spearmanr(ours, theirs).statistic)
    assert rank_correlation(theirs, np.exp(theirs)) == pytest.approx(1)
    assert rank_correlation(np.ones(40), theirs) == 0.0


@pytest.mark.parametrize("task", [ACCURACY, F1, R2], ids=lambda task: task.metric)
def test_scores_lie_in_their_interval_and_repeat(task: Task) -> None:
    predictions, targets, _ = draws(task, 200)
    one, two = (score(task, predictions, targets) for _ in range(2))
    assert one == two
    assert one.low < one.value < one.high
    assert one.metric == task.metric
    assert (one.spearman is None) == bool(task.classes)
    few = score(task, predictions[:50], targets[:50])
    assert few.high - few.low > one.high - one.low, "fewer examples, wider interval"


def test_an_interval_of_accuracy_is_about_the_binomial_one() -> None:
    targets = np.zeros(400)
    predictions = (np.arange(400) % 4 == 0).astype(float)  # right three times of four
    found = score(ACCURACY, predictions, targets)
    assert found.value == 0.75
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)


def test_all_right_has_no_spread() -> None:
    targets = np.arange(40) % 4.0
    found = score(ACCURACY, targets, targets)
    assert (found.low, found.value, found.high) == (1, 1, 1)


def test_paired_differences_are_narrower_than_two_intervals() -> None:
    predictions, targets, _ = draws(ACCURACY, 300)
    better = predictions.copy()
    wrong = np.flatnonzero(predictions != targets)[:20]
    better[wrong] = targets[wrong]
    low, high = difference_interval(ACCURACY, better, predictions, targets)
    assert 0 < low < 20 / 300 < high
    one = score(ACCURACY, predictions, targets)
    assert high - low < one.high - one.low
    assert difference_interval(ACCURACY, predictions, predictions, targets) == (0, 0)
    assert RESAMPLES >= 1000


def test_the_mean_difference_is_paired_and_covers_the_point():
    from icm_ray.evaluation.metrics import Answers, mean_difference

    task = make_task("accuracy", 2)
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 2, 200)
    theirs = np.where(draw.random(200) < 0.6, targets, 1 - targets)
    same = Answers(task, theirs, theirs, targets, 0.8)
    assert mean_difference([same, same]) == (0, 0, 0)
    better = Answers(task, targets, theirs, targets, 0.8)
    point, low, high = mean_difference([better, same])
    assert point == pytest.approx((1 - (theirs == targets).mean()) / 0.8 / 2)
    assert 0 < low < point < high
