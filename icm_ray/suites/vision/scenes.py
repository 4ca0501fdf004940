"""Rooms with things in them, drawn by ray casting: what each patch shows, and how far it is.

A floor, a back wall, and balls, boxes and pillars standing on the floor, each wrapped in a crop of
a photograph, under one light with shadows. Lengths are metres; x is right, y up, z forward.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from icm_ray.seeding import seed_for
from icm_ray.suites.vision import SURFACES
from icm_ray.suites.vision.painting import Painted
from icm_ray.suites.vision.photographs import Photographs

SIDE = 84
PATCH = 14
SAMPLES = 2
"""Rays along each side of a pixel."""
TEXTURE = 96
FAR = 1e6
"""Distance of what a ray misses."""
GRAZE = 1e-3
"""Shadow rays start this far off a surface, or they would hit it."""

Points = Float[np.ndarray, "rays 3"]
Hit = Callable[[Points, Points], tuple[np.ndarray, Points]]
"""Maps origins and unit directions to distances, `(rays,)`, and the normals there."""


@dataclass(frozen=True)
class Surface:
    """One thing of a scene.

    Args:
        kind: Index in `SURFACES`.
        hit: Where rays meet it.
        texture: `(TEXTURE, TEXTURE, 3)` in [0, 1], one metre wide.
    """

    kind: int
    hit: Hit
    texture: np.ndarray


@dataclass(frozen=True)
class View:
    """What a camera sees of a scene: a picture, and maps of its rays, `(across, across)`.

    Args:
        image: The picture.
        things: Number of the surface that each ray meets, in the scene's order.
        kinds: The kind of that surface.
        distance: How far it is, in metres.
        points: Where the ray meets it, `(across, across, 3)`.
        normals: What is upright on it there, `(across, across, 3)`.
        light: Share of light that falls there, 0 to about 1.2.
    """

    image: Image.Image
    things: np.ndarray
    kinds: np.ndarray
    distance: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    light: np.ndarray


def surfaces(split: str, photographs: Photographs, count: int) -> Iterator[Painted]:
    """Yield scenes with the surface that fills most of each patch."""
    for number in range(count):
        view = room("surface", split, number, photographs)
        yield Painted(view.image, most_of(view.kinds, len(SURFACES)), f"{split} {number}")


def distances(split: str, photographs: Photographs, count: int) -> Iterator[Painted]:
    """Yield scenes with the mean of 1 / distance over each patch, per metre."""
    for number in range(count):
        view = room("distance", split, number, photographs)
        yield Painted(view.image, mean_of(1 / view.distance), f"{split} {number}")


def most_of(values: np.ndarray, classes: int) -> np.ndarray:
    """Return the class that fills most of each patch of a square map."""
    patches = patches_of(values)
    filled = np.stack([(patches == one).sum(-1) for one in range(classes)])
    return filled.argmax(0).astype(np.float64)


def mean_of(values: np.ndarray) -> np.ndarray:
    """Return the mean over each patch of a square map, to four digits."""
    return np.round(patches_of(values).mean(-1), 4)


def patches_of(values: np.ndarray) -> np.ndarray:
    """Return `(patches, rays)` of a square map, patches in reading order."""
    across = SIDE // PATCH
    side = PATCH * SAMPLES
    return values.reshape(across, side, across, side).swapaxes(1, 2).reshape(across**2, side**2)


def room(task: str, split: str, number: int, photographs: Photographs) -> View:
    """Return the view of a room with three to six things in it."""
    rng = np.random.default_rng(seed_for("scene", task, split, number))
    return render(rng, lambda: _scene(rng, photographs), SIDE)


def render(rng: np.random.Generator, make: Callable[[], list[Surface]], side: int) -> View:
    """Return the view of a scene.

    Args:
        rng: What camera and light are drawn from, before and after the scene.
        make: Makes the scene, floor and wall first.
        side: Side of the picture in pixels.
    """
    eye = np.array([0.0, rng.uniform(1.0, 2.0), 0.0])
    rays = _rays(pitch=rng.uniform(0.1, 0.4), width=rng.uniform(0.4, 0.6), side=side)
    scene = make()
    origins = np.broadcast_to(eye, rays.shape)
    hits = [surface.hit(origins, rays) for surface in scene]
    first = np.argmin([t for t, _ in hits], axis=0)
    every = np.arange(len(rays))
    distance = np.array([t for t, _ in hits])[first, every]
    normals = np.array([n for _, n in hits])[first, every]
    points = origins + distance[:, None] * rays
    colours = np.stack([_wrap(s.texture, points, normals) for s in scene])[first, every]
    light = _light(rng, scene, points, normals)
    pixels = colours * light[:, None]
    picture = pixels.reshape(side, SAMPLES, side, SAMPLES, 3).mean((1, 3))
    image = Image.fromarray(np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8))
    kinds = np.array([surface.kind for surface in scene])[first]
    flat = (first, kinds, distance, points, normals, light)
    across = side * SAMPLES
    return View(image, *(one.reshape(across, across, *one.shape[1:]) for one in flat))


def _rays(pitch: float, width: float, side: int) -> Points:
    """Return unit directions in reading order; the camera looks down by `pitch` radians."""
    across = (np.arange(side * SAMPLES) + 0.5) / (side * SAMPLES) * 2 - 1
    x, y = np.meshgrid(across * width, -across * width)
    forward = np.ones_like(x)
    turned = [
        x,
        y * np.cos(pitch) - forward * np.sin(pitch),
        y * np.sin(pitch) + forward * np.cos(pitch),
    ]
    directions = np.stack(turned, axis=-1).reshape(-1, 3)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _scene(rng: np.random.Generator, photographs: Photographs) -> list[Surface]:
    wall = rng.uniform(5, 11)
    scene = [
        Surface(0, plane(1, 0.0), texture(rng, photographs)),
        Surface(1, plane(2, wall), texture(rng, photographs)),
    ]
    for _ in range(rng.integers(3, 7)):
        z = rng.uniform(1.8, min(wall - 0.8, 6.0))
        x = rng.uniform(-0.5, 0.5) * z
        kind = int(rng.integers(2, len(SURFACES)))
        size, height = rng.uniform(0.25, 0.6), rng.uniform(0.4, 1.8)
        if SURFACES[kind] == "ball":
            hit = ball(np.array([x, size, z]), size)
        elif SURFACES[kind] == "box":
            half = np.array([size, height / 2, rng.uniform(0.25, 0.6)])
            hit = box(np.array([x, half[1], z]), half, rng.uniform(0, np.pi / 2))
        else:
            hit = pillar(np.array([x, 0.0, z]), 0.6 * size, height)
        scene.append(Surface(kind, hit, texture(rng, photographs)))
    return scene


def texture(rng: np.random.Generator, photographs: Photographs) -> np.ndarray:
    """Return a random crop of a photograph, paler or darker, as `Surface` wants it."""
    pixels = np.asarray(photographs.crop(rng, TEXTURE), dtype=np.float64) / 255
    contrast = rng.uniform(0.2, 1.0)
    return (pixels * contrast + rng.uniform(0.3, 0.9, 3) * (1 - contrast)) * rng.uniform(0.6, 1.0)


def _wrap(texture: np.ndarray, points: Points, normals: Points) -> np.ndarray:
    """Return the texture's colours at `points`, seen along the axis they face most."""
    axis = np.abs(normals).argmax(1)
    across = np.where(axis == 0, points[:, 2], points[:, 0])
    along = np.where(axis == 1, points[:, 2], points[:, 1])
    # Misses are infinitely far; their colour is never used.
    place = np.stack([along, across]) % 1.0 * TEXTURE
    row, column = np.minimum(place.astype(int), TEXTURE - 1)
    return texture[row, column]


def _light(
    rng: np.random.Generator, scene: list[Surface], points: Points, normals: Points
) -> np.ndarray:
    """Return the share of light each point gets from a far lamp and from the sky."""
    lamp = np.array([rng.uniform(-1, 1), rng.uniform(0.8, 1.6), rng.uniform(-1.2, -0.2)])
    lamp = lamp / np.linalg.norm(lamp)
    starts = points + GRAZE * normals
    towards = np.broadcast_to(lamp, points.shape)
    things = [surface.hit(starts, towards)[0] for surface in scene[2:]]
    lit = np.min(things, axis=0) >= FAR
    sky = rng.uniform(0.3, 0.6)
    return sky + (1 - sky) * lit * np.clip(normals @ lamp, 0, None) * 1.2


def plane(axis: int, place: float) -> Hit:
    """Return the plane where coordinate `axis` is `place`, facing the camera."""

    def hit(origins: Points, rays: Points) -> tuple[np.ndarray, Points]:
        slope = np.where(np.abs(rays[:, axis]) < 1e-9, 1e-9, rays[:, axis])
        t = (place - origins[:, axis]) / slope
        normals = np.zeros_like(rays)
        normals[:, axis] = 1.0 if axis == 1 else -1.0
        return np.where(t > 0, np.minimum(t, FAR), FAR), normals

    return hit


def ball(centre: np.ndarray, radius: float) -> Hit:
    """Return a sphere."""

    def hit(origins: Points, rays: Points) -> tuple[np.ndarray, Points]:
        offset = origins - centre
        half = (offset * rays).sum(1)
        inside = half**2 - (offset**2).sum(1) + radius**2
        t = -half - np.sqrt(np.maximum(inside, 0))
        t = np.where((inside > 0) & (t > 0), t, FAR)
        return t, (origins + t[:, None] * rays - centre) / radius

    return hit


def box(centre: np.ndarray, half: np.ndarray, yaw: float) -> Hit:
    """Return a box of half sides `half`, turned by `yaw` radians about its upright axis."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])

    def hit(origins: Points, rays: Points) -> tuple[np.ndarray, Points]:
        start, way = (origins - centre) @ turn, rays @ turn
        way = np.where(np.abs(way) < 1e-9, 1e-9, way)
        enter = (-np.sign(way) * half - start) / way
        leave = (np.sign(way) * half - start) / way
        face, t = enter.argmax(1), enter.max(1)
        every = np.arange(len(rays))
        normals = np.zeros_like(rays)
        normals[every, face] = -np.sign(way[every, face])
        return np.where((t > 0) & (t < leave.min(1)), t, FAR), normals @ turn.T

    return hit


def pillar(foot: np.ndarray, radius: float, height: float) -> Hit:
    """Return an upright cylinder with a flat top; `foot` is where it stands on the floor."""

    def hit(origins: Points, rays: Points) -> tuple[np.ndarray, Points]:
        offset, way = (origins - foot)[:, [0, 2]], rays[:, [0, 2]]
        steep = np.maximum((way**2).sum(1), 1e-12)
        half = (offset * way).sum(1) / steep
        inside = half**2 - ((offset**2).sum(1) - radius**2) / steep
        side = -half - np.sqrt(np.maximum(inside, 0))
        y = origins[:, 1] + side * rays[:, 1]
        side = np.where((inside > 0) & (side > 0) & (y > 0) & (y < height), side, FAR)
        top, up = plane(1, height)(origins, rays)
        at = offset + top[:, None] * way
        top = np.where((at**2).sum(1) < radius**2, top, FAR)
        around = np.zeros_like(rays)
        around[:, [0, 2]] = (offset + side[:, None] * way) / radius
        return np.minimum(side, top), np.where((side <= top)[:, None], around, up)

    return hit
