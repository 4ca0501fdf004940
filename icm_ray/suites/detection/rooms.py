"""Rooms with solids and furniture in them, and the box around what is seen of each thing."""

from collections.abc import Iterator

import numpy as np

from icm_ray.seeding import seed_for
from icm_ray.suites.detection import FURNITURE, SIDE, SOLIDS
from icm_ray.suites.vision.painting import Painted
from icm_ray.suites.vision.photographs import Photographs
from icm_ray.suites.vision.scenes import (
    SAMPLES,
    Hit,
    Surface,
    ball,
    box,
    pillar,
    plane,
    render,
    texture,
)

LEAST_RAYS = 60 * SAMPLES**2
"""Of a thing that is labelled, in 60 pixels at least."""


def rooms(
    split: str, photographs: Photographs, family: tuple[str, ...], count: int
) -> Iterator[Painted]:
    """Yield rooms with the boxes of one family's things; up to two others stand among them."""
    others = FURNITURE if family == SOLIDS else SOLIDS
    for number in range(count):
        rng = np.random.default_rng(seed_for("room", family, split, number))
        own = [family[i] for i in rng.integers(len(family), size=rng.integers(1, 4))]
        more = [others[i] for i in rng.integers(len(others), size=rng.integers(0, 3))]
        names = [*own, *more]
        view = render(rng, lambda: _scene(rng, photographs, names), SIDE)  # noqa: B023
        boxes = [
            [*corners, family.index(name)]
            for place, name in enumerate(own)
            if (corners := _seen(view.kinds == place + 2))
        ]
        target = np.array(boxes, dtype=np.float64).reshape(-1, 5)
        yield Painted(view.image, target, f"{split} {number}")


def _seen(rays: np.ndarray) -> list[float]:
    """Return the corners in pixels around some rays; nothing if they are few."""
    if rays.sum() < LEAST_RAYS:
        return []
    rows, columns = np.nonzero(rays)
    low = columns.min(), rows.min()
    high = columns.max() + 1, rows.max() + 1
    return [float(x) / SAMPLES for x in (*low, *high)]


def _scene(rng: np.random.Generator, photographs: Photographs, names: list[str]) -> list[Surface]:
    """Return floor, wall and things side by side, whose kind is their number, counted from 2."""
    wall = rng.uniform(4.5, 9)
    scene = [
        Surface(0, plane(1, 0.0), texture(rng, photographs)),
        Surface(1, plane(2, wall), texture(rng, photographs)),
    ]
    places = rng.permutation(len(names))
    for number, name in enumerate(names):
        z = rng.uniform(1.9, 3.8)
        across = (places[number] + rng.uniform(0.3, 0.7)) / len(names) - 0.5
        foot = np.array([0.9 * across * z, 0.0, z])
        wrapped = texture(rng, photographs)
        scene += [Surface(number + 2, hit, wrapped) for hit in _hits(rng, name, foot)]
    return scene


def _hits(rng: np.random.Generator, name: str, foot: np.ndarray) -> list[Hit]:
    """Return what rays meet of a thing that stands at a place, turned at random."""
    yaw, size = rng.uniform(0, np.pi / 2), rng.uniform(0.25, 0.45)
    if name == "ball":
        return [ball(foot + np.array([0, size, 0]), size)]
    if name == "pillar":
        return [pillar(foot, 0.5 * size, rng.uniform(0.7, 1.6))]
    if name == "box":
        half = np.array([size, rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.45)])
        return [box(foot + np.array([0, half[1], 0]), half, yaw)]
    return [_part(foot, yaw, *part) for part in FRAMES[name](rng)]


def _part(foot: np.ndarray, yaw: float, place: tuple[float, ...], half: tuple[float, ...]) -> Hit:
    """Return a part of a thing, a box of half sides `half` at a place before it is turned."""
    x, y, z = place
    turned = [np.cos(yaw) * x + np.sin(yaw) * z, y, -np.sin(yaw) * x + np.cos(yaw) * z]
    return box(foot + turned, np.array(half), yaw)


Parts = list[tuple[tuple[float, ...], tuple[float, ...]]]


def _legs(x: float, z: float, height: float) -> Parts:
    return [
        ((i * x, height / 2, j * z), (0.04, height / 2, 0.04)) for i in (-1, 1) for j in (-1, 1)
    ]


def _table(rng: np.random.Generator) -> Parts:
    x, z, height = rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.45), rng.uniform(0.55, 0.8)
    return [((0, height, 0), (x, 0.04, z)), *_legs(x - 0.05, z - 0.05, height)]


def _chair(rng: np.random.Generator) -> Parts:
    x, height, back = rng.uniform(0.2, 0.3), rng.uniform(0.4, 0.5), rng.uniform(0.25, 0.4)
    seat = [((0, height, 0), (x, 0.04, x)), ((0, height + back, x), (x, back, 0.04))]
    return [*seat, *_legs(x - 0.04, x - 0.04, height)]


def _shelf(rng: np.random.Generator) -> Parts:
    x, height, boards = rng.uniform(0.3, 0.45), rng.uniform(1.0, 1.6), int(rng.integers(3, 5))
    sides = [((i * x, height / 2, 0), (0.03, height / 2, 0.15)) for i in (-1, 1)]
    levels = [0.05 + (height - 0.1) * i / (boards - 1) for i in range(boards)]
    return [*sides, *(((0, y, 0), (x, 0.03, 0.15)) for y in levels)]


FRAMES = {"table": _table, "chair": _chair, "shelf": _shelf}
"""Parts of furniture: where the middle of each box is, and its half sides, in metres."""
