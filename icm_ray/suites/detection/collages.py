"""Letters and handwritten digits on photographs, and the box around the ink of each."""

import gzip
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from icm_ray.seeding import seed_for
from icm_ray.suites.detection import DIGITS, LETTERS, SIDE
from icm_ray.suites.tasks import SPLITS
from icm_ray.suites.vision.glyphs import Glyphs, ground_of, inked, mask_of
from icm_ray.suites.vision.painting import Painted

SHARES = {"train": 0.6, "calibration": 0.1, "validation": 0.1, "test": 0.2}
"""Of the handwritten digits; each is in one split."""
TRIES = 20
"""To find a free place for a glyph; then it is left out."""
Corners = tuple[int, int, int, int]


def collages(glyphs: Glyphs, mnist: Path, family: tuple[str, ...], count: int) -> Iterator[Painted]:
    """Yield pictures with the boxes of one family's glyphs; up to two others lie among them."""
    written = _written(mnist, glyphs.split)
    for number in range(count):
        rng = np.random.default_rng(seed_for("collage", family, glyphs.split, number))
        others = DIGITS if family == LETTERS else LETTERS
        own = [family[i] for i in rng.integers(len(family), size=rng.integers(1, 4))]
        more = [others[i] for i in rng.integers(len(others), size=rng.integers(0, 3))]
        ink, taken, boxes = Image.new("L", (SIDE, SIDE)), list[Corners](), []
        for place, name in enumerate([*own, *more]):
            mask = _glyph(rng, glyphs, written, name)
            corners = _placed(rng, mask, taken)
            if corners is None:
                continue
            taken.append(corners)
            ink.paste(mask, corners[:2])
            if place < len(own):
                boxes.append([*corners, family.index(name)])
        image = inked(rng, ground_of(rng, glyphs.photographs, SIDE), ink)
        target = np.array(boxes, dtype=np.float64).reshape(-1, 5)
        yield Painted(image, target, f"{glyphs.split} {number}")


def _glyph(
    rng: np.random.Generator, glyphs: Glyphs, written: dict[str, list[np.ndarray]], name: str
) -> Image.Image:
    """Return a letter or a digit, white on black, cropped to its ink."""
    longest = int(rng.integers(22, 45))
    if name in LETTERS:
        return mask_of(name, glyphs.face(rng), rng.uniform(-20, 20), longest)
    images = written[name]
    digit = Image.fromarray(images[rng.integers(len(images))].reshape(28, 28))
    digit = digit.crop(digit.point([0] * 61 + [255] * 195).getbbox())
    scale = longest / max(digit.size)
    width, height = (max(1, round(length * scale)) for length in digit.size)
    return digit.resize((width, height), Image.Resampling.BICUBIC)


def _placed(rng: np.random.Generator, mask: Image.Image, taken: list[Corners]) -> Corners | None:
    """Return corners where a glyph covers no other; None where there is no room."""
    for _ in range(TRIES):
        x, y = (int(rng.integers(SIDE - length + 1)) for length in mask.size)
        right, low = x + mask.size[0], y + mask.size[1]
        if all(x >= c or right <= a or y >= d or low <= b for a, b, c, d in taken):
            return x, y, right, low
    return None


@cache
def _written(mnist: Path, split: str) -> dict[str, list[np.ndarray]]:
    """Return a split's handwritten digits by name; images that occur twice count once."""
    with gzip.open(mnist) as file:
        rows = np.unique(np.loadtxt(file, delimiter=",", dtype=np.uint8), axis=0)
    order = sorted(range(len(rows)), key=lambda row: seed_for("written", row))
    start = sum(SHARES[name] for name in SPLITS[: SPLITS.index(split)])
    first, last = (round(len(rows) * share) for share in (start, start + SHARES[split]))
    own = rows[order[first:last]]
    return {name: list(own[own[:, -1] == int(name), :-1]) for name in DIGITS}
