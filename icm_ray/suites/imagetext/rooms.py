"""Rooms with one to four coloured things side by side, and what there is to say of them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageOps

from icm_ray.seeding import seed_for
from icm_ray.suites.vision.photographs import Photographs
from icm_ray.suites.vision.scenes import (
    SAMPLES,
    TEXTURE,
    Hit,
    Surface,
    ball,
    box,
    pillar,
    plane,
    render,
    texture,
)

SIDE = 84
"""Of a picture in pixels: six patches of DINOv2."""
KINDS = ("ball", "box", "pillar")
COLOURS = {
    "red": (0.80, 0.12, 0.10),
    "yellow": (0.90, 0.80, 0.12),
    "green": (0.12, 0.55, 0.18),
    "blue": (0.12, 0.25, 0.80),
    "purple": (0.55, 0.15, 0.65),
    "white": (0.95, 0.95, 0.95),
}
"""Red, green and blue of each colour's paint, in [0, 1]."""
MOST = 4
"""Things in a room."""
LEAST_RAYS = 130 * SAMPLES**2
"""Of each thing, in 130 pixels at least: two thirds of a patch."""
FLOOR, WALL = 0, 1
"""Numbers of the surfaces that are no things; these follow, from left to right."""


@dataclass(frozen=True)
class Thing:
    """One thing of a room: its paint and its kind."""

    colour: str
    kind: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Room:
    """A picture and what is in it.

    Args:
        image: `SIDE` pixels wide and high.
        things: From left to right; no two of one colour.
        rays: Number of the surface that each ray meets, things from 2 on.
    """

    image: Image.Image
    things: tuple[Thing, ...]
    rays: Int[np.ndarray, "across across"]

    @property
    def mirrored(self) -> "Room":
        """The room seen in a mirror."""
        last = len(self.things) + 1
        swapped = np.where(self.rays > WALL, last + 2 - self.rays, self.rays)
        return Room(ImageOps.mirror(self.image), self.things[::-1], swapped[:, ::-1])


def room(name: str, split: str, number: int, photographs: Photographs) -> Room:
    """Return a room drawn for a name, a split and a number; every thing in it is well seen."""
    rng = np.random.default_rng(seed_for("imagetext", name, split, number))
    count = 1 + number % MOST
    while True:
        things = _things(rng, count)
        view = render(rng, lambda: _scene(rng, photographs, things), SIDE)  # noqa: B023
        if all((view.kinds == place + 2).sum() >= LEAST_RAYS for place in range(count)):
            return Room(view.image, things, view.kinds)


def _things(rng: np.random.Generator, count: int) -> tuple[Thing, ...]:
    """Return things of different colours, at least one of whose kind there is no other."""
    while True:
        colours = rng.permutation([*COLOURS])[:count]
        kinds = [KINDS[place] for place in rng.integers(len(KINDS), size=count)]
        if any(kinds.count(kind) == 1 for kind in kinds):
            return tuple(Thing(str(c), k) for c, k in zip(colours, kinds, strict=True))


def _scene(
    rng: np.random.Generator, photographs: Photographs, things: tuple[Thing, ...]
) -> list[Surface]:
    """Return floor, wall and things; the kind of each is its number."""
    scene = [
        Surface(FLOOR, plane(1, 0.0), texture(rng, photographs)),
        Surface(WALL, plane(2, rng.uniform(4.5, 9)), texture(rng, photographs)),
    ]
    for number, thing in enumerate(things):
        z = rng.uniform(1.9, 3.2)
        across = (number + rng.uniform(0.35, 0.65)) / len(things) - 0.5
        size = rng.uniform(0.3, 0.45) * (1.0 if len(things) < 3 else 0.8)
        foot = np.array([0.85 * across * z, 0.0, z])
        paint = _paint(rng, photographs, COLOURS[thing.colour])
        scene.append(Surface(number + 2, _hit(rng, thing.kind, foot, size), paint))
    return scene


def _hit(rng: np.random.Generator, kind: str, foot: np.ndarray, size: float) -> Hit:
    """Return what rays meet of a thing that stands at a place."""
    up = np.array([0.0, 1.0, 0.0])
    if kind == "ball":
        return ball(foot + size * up, size)
    if kind == "pillar":
        return pillar(foot, 0.5 * size, rng.uniform(0.9, 1.5))
    half = np.array([0.9 * size, rng.uniform(0.25, 0.4), 0.9 * size])
    return box(foot + half[1] * up, half, rng.uniform(0, np.pi / 2))


def _paint(
    rng: np.random.Generator, photographs: Photographs, colour: tuple[float, ...]
) -> np.ndarray:
    """Return a colour, a little off, with the grain of a photograph, as `Surface` wants it."""
    grain = np.asarray(photographs.crop(rng, TEXTURE).convert("L"), dtype=np.float64) / 255
    shade = 1 + rng.uniform(0.1, 0.5) * (grain - grain.mean())
    return np.clip(np.array(colour) + rng.normal(0, 0.04, 3), 0, 1) * shade[..., None]
