"""Mean average precision: cases by hand, pycocotools' own sum, and resamples of images."""

import contextlib
import io

import numpy as np
import pytest

from icm_ray.evaluation.average_precision import _index, mean_average_precision
from icm_ray.evaluation.metrics import difference_interval, score
from icm_ray.suites.tasks import Task

TASK = Task("things", "detection", "map50", ("cup", "pot"), 0)
NOTHING = [0.0, 0, 0, 0, -1]


def scored(found: list, true: list, thresholds=(0.5,)) -> float:
    """Return the score of images whose boxes are written as lists."""
    width = max(1, *map(len, found))
    filled = np.array([[*own, *[[*NOTHING, 0]] * (width - len(own))] for own in found], float)
    most = max(1, *map(len, true))
    targets = np.array([[*own, *[NOTHING] * (most - len(own))] for own in true], float)
    ones = np.ones((1, len(true)))
    return float(
        mean_average_precision(filled.reshape(len(found), -1), targets, ones, thresholds)[0]
    )


def test_right_boxes_are_all_and_wrong_ones_cost_what_they_stand_before() -> None:
    box, away = [0, 0, 10, 10], [50, 50, 60, 60]
    assert scored([[[*box, 0, 0.9]]], [[[*box, 0]]]) == pytest.approx(1)
    assert scored([[[*box, 1, 0.9]]], [[[*box, 0]]]) == 0
    # A better scored miss halves precision at every recall.
    assert scored([[[*away, 0, 0.9], [*box, 0, 0.8]]], [[[*box, 0]]]) == pytest.approx(0.5)
    # A worse scored one costs nothing, and neither does the second box on one thing.
    assert scored([[[*box, 0, 0.9], [*box, 0, 0.8]]], [[[*box, 0]]]) == pytest.approx(1)
    # One of two is found: precision is 1 at recalls 0 to .5, 51 of 101.
    assert scored([[[*box, 0, 0.9]]], [[[*box, 0], [*away, 0]]]) == pytest.approx(51 / 101)
    # The mean is over classes that are there.
    both = scored([[[*box, 0, 0.9]]], [[[*box, 0], [*away, 1]]])
    assert both == pytest.approx(0.5)


def test_thresholds_say_how_near_a_box_must_be() -> None:
    # Shared 8 x 10 of 12 x 10: an intersection over union of 2/3.
    found, true = [[[2, 0, 12, 10, 0, 0.9]]], [[[0, 0, 10, 10, 0]]]
    every = np.linspace(0.5, 0.95, 10).tolist()
    assert scored(found, true) == pytest.approx(1)
    assert scored(found, true, [0.7]) == 0
    assert scored(found, true, every) == pytest.approx(0.4)  # .5, .55, .6 and .65


def test_images_without_things_or_without_boxes() -> None:
    box = [0, 0, 10, 10]
    assert scored([[], []], [[[*box, 0]], []]) == 0
    assert scored([[[*box, 0, 0.5]], []], [[], []]) == 0
    assert scored([[[*box, 0, 0.9]], [[*box, 0, 0.5]]], [[[*box, 0]], []]) == pytest.approx(1)
    assert scored([[[*box, 0, 0.5]], [[*box, 0, 0.9]]], [[[*box, 0]], []]) == pytest.approx(0.5)


def drawn(images: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Return found and true boxes of some images: shifted, doubled, missed, of the wrong class."""
    draw = np.random.default_rng(0)
    low = draw.uniform(0, 60, (images, 4, 2))
    true = np.concatenate([low, low + draw.uniform(10, 40, (images, 4, 2))], -1)
    classes = draw.integers(-1, 3, (images, 4, 1)).astype(float)
    near = true + draw.normal(0, 3, true.shape)
    kinds = np.where(draw.random(classes.shape) < 0.8, classes, draw.integers(0, 3, classes.shape))
    far = np.concatenate([low[:, ::-1], low[:, ::-1] + 20], -1)
    found = np.concatenate([near, far], 1)
    kinds = np.concatenate([kinds, draw.integers(0, 3, classes.shape)], 1)
    sure = np.concatenate([draw.beta(4, 2, (images, 4, 1)), draw.beta(2, 4, (images, 4, 1))], 1)
    found = np.concatenate([found, kinds, sure], -1)
    return found.reshape(images, -1), np.concatenate([true, classes], -1)


def test_it_is_what_pycocotools_sums() -> None:
    from pycocotools.cocoeval import COCOeval

    found, true = drawn()
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(_index(true), _index(found.reshape(len(found), -1, 6)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    ones = np.ones((1, len(true)))
    whole, half = judge.stats[:2]
    assert 0.1 < whole < half < 0.9
    every = np.linspace(0.5, 0.95, 10).tolist()
    assert mean_average_precision(found, true, ones, every)[0] == pytest.approx(whole, abs=1e-9)
    assert mean_average_precision(found, true, ones, [0.5])[0] == pytest.approx(half, abs=1e-9)
    told = score(TASK, found, true)
    assert told.value == pytest.approx(half)
    assert told.details["map"] == pytest.approx(whole)
    assert told.low < told.value < told.high


def test_weights_are_images_that_count_several_times_or_not_at_all() -> None:
    found, true = drawn()
    counts = np.random.default_rng(1).multinomial(len(true), np.full(len(true), 1 / len(true)), 3)
    weighted = mean_average_precision(found, true, counts.astype(float), [0.5])
    for value, row in zip(weighted, counts, strict=True):
        again = np.repeat(np.arange(len(true)), row)
        alone = mean_average_precision(found[again], true[again], np.ones((1, len(again))), [0.5])
        assert value == pytest.approx(alone[0], abs=1e-9)


def test_intervals_are_of_paired_images() -> None:
    found, true = drawn()
    assert difference_interval(TASK, found, found, true) == (0, 0)
    worse = found.copy().reshape(len(found), -1, 6)
    worse[..., :2] += 8
    low, high = difference_interval(TASK, found, worse.reshape(found.shape), true)
    assert 0 < low < high
