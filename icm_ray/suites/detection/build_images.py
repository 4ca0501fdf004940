"""Rebuild the data files of the detection suite from unpacked source packages.

    python -m icm_ray.suites.detection.build_images --mnist mnist_5k.csv.gz --skimage skimage/data \
        --datasets package --fonts usr/share/fonts [--out FOLDER] [--check]

The sources are those of the vision suite, whose `data/README.md` says where they come from; so are
the options. The same sources give the same pictures with the same versions of Pillow and NumPy.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from icm_ray.suites.detection import DIGITS, FURNITURE, LETTERS, SOLIDS
from icm_ray.suites.detection.collages import collages
from icm_ray.suites.detection.rooms import rooms
from icm_ray.suites.vision.build_images import Make, run

SIZES = {"train": 512, "calibration": 64, "validation": 64, "test": 128}

TASKS: dict[str, tuple[Make, int]] = {
    "solids": (lambda s, n: rooms(s.split, s.photographs, SOLIDS, n), 45),
    "furniture": (lambda s, n: rooms(s.split, s.photographs, FURNITURE, n), 45),
    "letters": (lambda s, n: collages(s.glyphs, s.mnist, LETTERS, n), 45),
    "digits": (lambda s, n: collages(s.glyphs, s.mnist, DIGITS, n), 45),
}
"""How a split of each task is made, and the quality of WebP it is encoded with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every data file, or check them; return the exit code."""
    return run(arguments, TASKS, SIZES, Path(__file__).parent)


if __name__ == "__main__":
    sys.exit(main())
