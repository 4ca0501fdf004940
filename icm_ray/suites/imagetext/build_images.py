"""Rebuild the data file of the imagetext suite from unpacked source packages.

    python -m icm_ray.suites.imagetext.build_images --mnist mnist_5k.csv.gz \
        --skimage skimage/data --datasets package --fonts usr/share/fonts [--out FOLDER] [--check]

The sources are those of the vision suite, whose `data/README.md` says where they come from; so are
the options. The same sources give the same pictures with the same versions of Pillow and NumPy.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from icm_ray.suites.imagetext import pictures
from icm_ray.suites.vision.build_images import Make, run
from icm_ray.suites.vision.painting import Painted
from icm_ray.suites.vision.photographs import Photographs

SIZES = {"train": 1536, "calibration": 128, "validation": 64, "test": 128}

TABLES: dict[str, tuple[Make, int]] = {
    "rooms": (lambda s, n: _rooms(s.split, s.photographs, n), 45),
}
"""How a split of the table is made, and the quality of WebP it is encoded with."""


def _rooms(split: str, photographs: Photographs, count: int) -> Iterator[Painted]:
    return (one.painted for one in pictures.rooms(split, photographs, count, "room"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data file, or check it; return the exit code."""
    return run(arguments, TABLES, SIZES, Path(__file__).parent)


if __name__ == "__main__":
    sys.exit(main())
