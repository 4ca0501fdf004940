"""The dense suite: one table of rooms, six maps of each that say the same scene."""

from functools import cache

import numpy as np
import pytest
from PIL import Image

from icm_ray.suites import SPLITS, SUITES, Examples
from icm_ray.suites.dense.build_images import SIZES
from icm_ray.suites.dense.maps import maps_of
from icm_ray.suites.vision.scenes import PATCH, SAMPLES, SIDE, View

DENSE = SUITES["dense"]
DATA = DENSE.folder / "data"
TASKS = sorted(DENSE.tasks)
PATCHES = (SIDE // PATCH) ** 2
ACROSS = SIDE * SAMPLES


@cache
def load(task: str, split: str) -> Examples:
    """Decode a split once for all tests."""
    return DENSE.load(task, split)


def test_splits_have_their_sizes_and_share_no_room() -> None:
    seen: set[str] = set()
    for split in SPLITS:
        examples = load("surface", split)
        assert len(examples) == SIZES[split]
        assert examples.images is not None
        assert examples.images.shape[1:] == (SIDE, SIDE, 3)
        assert examples.images.std(axis=(1, 2, 3)).min() > 1  # no picture is blank
        assert not seen & set(examples.documents)
        seen |= set(examples.documents)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_the_same_rooms_and_says_something_of_each_patch(task: str) -> None:
    for split in ("validation", "test"):
        first, own = load("surface", split), load(task, split)
        assert own.documents == first.documents
        assert np.array_equal(own.images, first.images)
        assert own.targets.shape == (SIZES[split], PATCHES)
        assert np.isfinite(own.targets).all()
        classes = DENSE.tasks[task].classes
        assert set(np.unique(own.targets)) == set(range(len(classes))) or not classes
        assert own.targets.std() > 0.01


def test_the_maps_of_a_room_agree() -> None:
    maps = {task: load(task, "test").targets for task in TASKS}
    names = DENSE.tasks["normal"].classes
    floor, wall = maps["surface"] == 0, maps["surface"] == 1
    assert (maps["normal"][floor] == names.index("up")).mean() > 0.97
    assert (maps["normal"][wall] == names.index("front")).mean() > 0.97
    assert maps["height"][floor].mean() < 0.1 < 1 < maps["height"][wall].mean()
    assert maps["edges"].min() >= 0
    assert maps["edges"].max() < 0.3
    assert maps["distance"][wall].mean() < maps["distance"][floor].mean()


def view(**maps: np.ndarray) -> View:
    """A view with some maps; the others are zero."""
    flat, space = np.zeros((ACROSS, ACROSS)), np.zeros((ACROSS, ACROSS, 3))
    whole = {"things": flat, "kinds": flat, "light": flat, "distance": flat + 1}
    whole |= {"points": space, "normals": space}
    return View(image=Image.new("RGB", (SIDE, SIDE)), **{**whole, **maps})


def test_an_edge_is_where_things_meet() -> None:
    things = np.zeros((ACROSS, ACROSS), dtype=int)
    things[:, PATCH * SAMPLES - 1 :] = 1  # the border runs inside the first patch of each row
    edges = maps_of(view(things=things))["edges"].reshape(SIDE // PATCH, -1)
    assert np.allclose(edges[:, 0], 1 / (PATCH * SAMPLES), atol=1e-4)
    assert (edges[:, 1:] == 0).all()


@pytest.mark.parametrize(
    ("normal", "name"),
    [((0, 1, 0), "up"), ((-1, 0, 0), "left"), ((0.9, 0, -0.4), "right"), ((0.2, 0, -1), "front")],
)
def test_a_surface_faces_where_its_normal_points(normal: tuple[float, ...], name: str) -> None:
    normals = np.broadcast_to(np.array(normal), (ACROSS, ACROSS, 3))
    facing = maps_of(view(normals=normals))["normal"]
    assert (facing == DENSE.tasks["normal"].classes.index(name)).all()


def test_the_data_are_small_and_their_licences_are_told() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.parquet")) < 2_500_000
    readme = (DATA / "README.md").read_text()
    for name, task in DENSE.tasks.items():
        assert f"`{name}`" in readme
        assert task.source
        assert task.licence
