"""Mean average precision of boxes, as COCO defines it, for many resamples of the images at once.

pycocotools says which box found which; its own sum over images knows no weights, and a thousand
resamples would each be counted anew. So precision and recall are summed here, with weights.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

RECALLS = np.linspace(0, 1, 101)
"""Precision is averaged over these recalls."""
AT_ONCE = 4_000_000
"""Numbers that are summed at once: resamples times boxes."""


class _Matched(NamedTuple):
    """One class: its true boxes in each image, and the found boxes, the best first.

    Attributes:
        true: `(images,)`, how many there are.
        image: `(boxes,)`, the image of each found box.
        hit: `(thresholds, boxes)`, whether it meets a true box that no better one has met.
    """

    true: np.ndarray
    image: np.ndarray
    hit: np.ndarray


def mean_average_precision(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
    """Return the mean over classes and thresholds of the average precision, once for each row.

    Args:
        predictions: What `detection.decoded` gives, `(images, 6 * boxes)`.
        targets: Corners and class of each true box, `(images, boxes, 5)`.
        weights: How often each image counts, `(rows, images)`.
        thresholds: Least intersection over union of a box that was found.

    Returns:
        `(rows,)` in [0, 1]; a class that no image of a row shows is left out, as COCO does.
    """
    found = predictions.reshape(len(predictions), -1, 6)
    sums, classes = np.zeros(len(weights)), np.zeros(len(weights))
    for one in _matched(found, targets, thresholds):
        true = weights @ one.true
        for rows in np.array_split(
            np.arange(len(weights)), 1 + len(weights) * len(one.image) // AT_ONCE
        ):
            counts = weights[rows][:, one.image]
            seen = counts.cumsum(1)
            each = [_average_precision(counts * hit, seen, true[rows]) for hit in one.hit]
            sums[rows] += np.mean(each, axis=0)
        classes += true > 0
    return sums / np.maximum(classes, 1)


def _average_precision(hits: np.ndarray, seen: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return each row's area under precision over recall; 0 where nothing is true or found."""
    if not hits.shape[1]:
        return np.zeros(len(hits))
    met = hits.cumsum(1)
    precision = met / np.maximum(seen, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = met / np.maximum(true, 1)[:, None]
    areas = np.zeros(len(hits))
    for row, (reached, best) in enumerate(zip(recall, precision, strict=True)):
        place = np.searchsorted(reached, RECALLS)
        areas[row] = best[place[place < len(best)]].sum() / len(RECALLS)
    return areas * (true > 0)


def _matched(
    found: np.ndarray, targets: np.ndarray, thresholds: Sequence[float]
) -> Iterator[_Matched]:
    """Yield each class that has a true box, matched by pycocotools."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it says how long everything took
        judge: Any = COCOeval(_index(targets), _index(found), "bbox")
        judge.params.iouThrs = np.asarray(thresholds)
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.params.imgIds = list(range(1, len(found) + 1))
        judge.params.catIds = sorted({int(c) for c in targets[..., 4].ravel() if c >= 0})
        judge.evaluate()
    by_class = len(found)
    for place in range(len(judge.params.catIds)):
        images = judge.evalImgs[place * by_class : (place + 1) * by_class]
        true = np.array([len(one["gtIds"]) if one else 0 for one in images])
        scores = [np.asarray(one["dtScores"] if one else []) for one in images]
        hits = [np.asarray(one["dtMatches"]) > 0 for one in images if one]
        image = np.repeat(np.arange(by_class), [len(own) for own in scores])
        order = np.argsort(-np.concatenate(scores), kind="stable")
        yield _Matched(true, image[order], np.concatenate(hits, 1)[:, order])


def _index(boxes: np.ndarray) -> Any:
    """Return pycocotools' index of `(images, boxes, 5)`, or of 6 numbers a box with scores."""
    from pycocotools.coco import COCO

    rows = [
        {
            "id": number,
            "image_id": int(image) + 1,
            "category_id": int(box[4]),
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "area": (box[2] - box[0]) * (box[3] - box[1]),
            "iscrowd": 0,
            **({"score": box[5]} if len(box) > 5 else {}),
        }
        for number, (image, box) in enumerate(
            ((i, box) for i, own in enumerate(boxes.tolist()) for box in own if box[4] >= 0), 1
        )
    ]
    index: Any = COCO()
    index.dataset = {
        "images": [{"id": number + 1} for number in range(len(boxes))],
        "categories": [{"id": c} for c in sorted({row["category_id"] for row in rows})],
        "annotations": rows,
    }
    index.createIndex()
    return index
