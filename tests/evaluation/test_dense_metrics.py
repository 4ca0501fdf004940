"""Scores of maps: pooled over patches, resampled by image, beside sklearn."""

import numpy as np
import pytest
from sklearn import metrics as sk

from icm_ray.evaluation.metrics import difference_interval, score, weighted
from icm_ray.suites.tasks import Task

CLASSES = ("floor", "wall", "ball", "box")
SURFACE = Task("surface", "dense_classification", "miou", CLASSES, 0, "nowhere", "none")
DISTANCE = Task("distance", "dense_regression", "r2", (), 0, "nowhere", "none")


def draws(task: Task, images: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return maps of 9 patches, predicted and true, and rows of resample counts."""
    draw = np.random.default_rng(0)
    if task.classes:
        true = draw.integers(0, 4, (images, 9)).astype(float)
        guess = draw.integers(0, 4, (images, 9)).astype(float)
        predicted = np.where(draw.random((images, 9)) < 0.7, true, guess)
    else:
        # Images differ more than patches do, so resampling patches would be another interval.
        true = draw.normal(0.3, 0.1, (images, 1)) + draw.normal(0, 0.05, (images, 9))
        predicted = true + draw.normal(0, 0.05, (images, 9)) + draw.normal(0, 0.05, (images, 1))
    counts = draw.multinomial(images, np.full(images, 1 / images), 8).astype(float)
    return predicted, true, np.concatenate([np.ones((1, images)), counts])


@pytest.mark.parametrize("task", [SURFACE, DISTANCE], ids=lambda task: task.metric)
def test_maps_are_scored_as_sklearn_scores_all_their_patches(task: Task) -> None:
    predicted, true, counts = draws(task)
    found = weighted(task, predicted, true, counts)
    for value, row in zip(found, counts, strict=True):
        images = np.repeat(np.arange(len(true)), row.astype(int))
        p, t = predicted[images].ravel(), true[images].ravel()
        expected = sk.jaccard_score(t, p, average="macro") if task.classes else sk.r2_score(t, p)
        assert value == pytest.approx(expected, rel=1e-9)


def test_a_class_nobody_shows_or_names_is_left_out() -> None:
    predicted, true = np.array([[0.0, 0, 1]]), np.array([[0.0, 1, 1]])
    assert weighted(SURFACE, predicted, true, np.ones((1, 1)))[0] == pytest.approx(0.5)


def test_rmse_stands_beside_r2() -> None:
    predicted, true, _ = draws(DISTANCE)
    told = score(DISTANCE, predicted, true)
    expected = sk.root_mean_squared_error(true.ravel(), predicted.ravel())
    assert told.details["rmse"] == pytest.approx(expected)
    assert told.low < told.value < told.high


def test_intervals_resample_images_and_pair_them() -> None:
    predicted, true, _ = draws(DISTANCE)
    low, high = difference_interval(DISTANCE, predicted, predicted, true)
    assert low == high == 0
    worse = predicted + 0.2
    low, high = difference_interval(DISTANCE, predicted, worse, true)
    assert 0 < low < high
    # One image repeated says no more than itself: the interval of a single map has no width.
    alone = score(SURFACE, np.array([[0.0, 1, 2]]), np.array([[0.0, 1, 3]]))
    assert alone.low == alone.value == alone.high
