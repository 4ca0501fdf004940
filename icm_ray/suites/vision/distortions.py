"""Photographs spoilt in one of eight ways: which way it was."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

from icm_ray.seeding import seed_for
from icm_ray.suites.vision import DISTORTIONS
from icm_ray.suites.vision.painting import Painted
from icm_ray.suites.vision.photographs import Photographs

SIDE = 56


def distorted(split: str, photographs: Photographs, count: int) -> Iterator[Painted]:
    """Yield crops of a split's photographs, each spoilt in the way its target says."""
    for number in range(count):
        rng = np.random.default_rng(seed_for("distortion", split, number))
        target = number % len(DISTORTIONS)
        name = photographs.names[int(rng.integers(len(photographs.names)))]
        crop = photographs.crop(rng, SIDE, name)
        # Flat patches of sky or table show no distortion at all.
        while np.asarray(crop.convert("L")).std() < 12:
            crop = photographs.crop(rng, SIDE, name)
        yield Painted(spoil(crop, DISTORTIONS[target], rng), target, name)


def spoil(image: Image.Image, way: str, rng: np.random.Generator) -> Image.Image:
    """Return the image distorted one `way`, from barely visible to strong."""
    force = rng.uniform(0, 1)
    if way == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.7 + 1.3 * force))
    if way == "motion":
        return _moved(image, rng.uniform(0, np.pi), 2 + 3 * force)
    if way == "noise":
        noise = rng.normal(0, 6 + 22 * force, (image.height, image.width, 3))
        return _image(np.asarray(image) + noise)
    if way == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=round(25 - 17 * force))
        return Image.open(file).convert("RGB")
    if way == "pixels":
        side = round(image.width / (1.7 + 1.5 * force))
        small = image.resize((side, side), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.NEAREST)
    if way == "posterised":
        levels = 6 - 3 * force
        return _image(np.rint(np.asarray(image) / 255 * levels) / levels * 255)
    if way == "sharpened":
        return image.filter(ImageFilter.UnsharpMask(1.5, round(120 + 250 * force), 0))
    return image


def _moved(image: Image.Image, angle: float, reach: float) -> Image.Image:
    """Return the mean of copies shifted along one direction, up to `reach` pixels either way."""
    steps = np.linspace(-reach, reach, 9)
    shifts = [(s * np.cos(angle), s * np.sin(angle)) for s in steps]
    copies = [
        image.transform(
            image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y), Image.Resampling.BILINEAR
        )
        for x, y in shifts
    ]
    return _image(np.mean([np.asarray(copy, dtype=np.float64) for copy in copies], axis=0))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))
