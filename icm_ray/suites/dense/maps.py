"""What a view of a room says of each patch: the targets of the dense suite."""

from collections.abc import Mapping

import numpy as np

from icm_ray.suites.dense import NORMALS, SURFACES
from icm_ray.suites.vision.scenes import View, mean_of, most_of

UPRIGHT = 0.7
"""Upward part of a normal from which a surface faces up."""
SIDEWAYS = 0.5
"""Sideward part of a normal from which a surface faces left or right."""


def maps_of(view: View) -> Mapping[str, np.ndarray]:
    """Return the target of each task, `(patches,)` in reading order.

    Classes as `suite.yaml` orders them; `edges` the share of a patch next to another thing, `light`
    the mean share of light, `distance` the mean of 1 / distance, per metre, `height` the mean
    height above the floor, in metres.
    """
    return {
        "surface": most_of(view.kinds, len(SURFACES)),
        "normal": most_of(_facing(view.normals), len(NORMALS)),
        "edges": mean_of(_edges(view.things)),
        "light": mean_of(view.light),
        "distance": mean_of(1 / view.distance),
        "height": mean_of(view.points[..., 1]),
    }


def _facing(normals: np.ndarray) -> np.ndarray:
    """Return the class of each normal, `(across, across)`; x is right and y up."""
    x, y = normals[..., 0], normals[..., 1]
    sideways = np.where(x < -SIDEWAYS, "left", np.where(x > SIDEWAYS, "right", "front"))
    names = np.where(y > UPRIGHT, "up", sideways)
    return np.stack([names == name for name in NORMALS]).argmax(0)


def _edges(things: np.ndarray) -> np.ndarray:
    """Say of each ray whether its right or lower neighbour meets another thing."""
    right = np.diff(things, axis=1, append=things[:, -1:]) != 0
    below = np.diff(things, axis=0, append=things[-1:]) != 0
    return right | below
