"""Rebuild the data files of the imagetext suite from unpacked source packages.

    python -m icm_ray.suites.imagetext.build_images --mnist mnist_5k.csv.gz \
        --skimage skimage/data --datasets package --fonts usr/share/fonts [--out FOLDER] [--check]

The sources are those of the vision suite, whose `data/README.md` says where they come from; so are
the options. The same sources give the same pictures with the same versions of Pillow and NumPy.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from icm_ray.suites.imagetext import pictures
from icm_ray.suites.vision.build_images import Make, run
from icm_ray.suites.vision.painting import Painted

SIZES = {"train": 768, "calibration": 128, "validation": 64, "test": 128}
"""Pictures of a table; there are twice as many rooms to train on, which five tasks share."""


def _all(made: Iterable[pictures.Captioned]) -> Iterator[Painted]:
    return (one.painted for one in made)


def _rooms(split: str, count: int) -> int:
    return 2 * count if split == "train" else count


TABLES: dict[str, tuple[Make, int]] = {
    "rooms": (
        lambda s, n: _all(pictures.rooms(s.split, s.photographs, _rooms(s.split, n), "room")),
        45,
    ),
    "numbers": (lambda s, n: _all(pictures.numbers(s.split, s.glyphs, n, "number")), 40),
    "photographs": (
        lambda s, n: _all(pictures.photographs(s.split, s.photographs, n, "photograph")),
        50,
    ),
}
"""How a split of each table is made, and the quality of WebP it is encoded with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every data file, or check them; return the exit code."""
    return run(arguments, TABLES, SIZES, Path(__file__).parent)


if __name__ == "__main__":
    sys.exit(main())
