"""Curves of what merges keep, over the number of experts and of unlabelled inputs.

    python -m icm_ray.report.curves OUT.png --experts 2=k2/results.parquet 4=k4/results.parquet \
        --inputs 16=inputs16/results.parquet

Each table is a pipeline's `results.parquet`. Import this module lazily: it needs matplotlib.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from icm_ray.report.data import REFERENCES, ScoreRow
from icm_ray.report.pictures import logarithmic, png
from icm_ray.report.text import is_number

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Points by method, in the order of their first axis."""

HEIGHT = 4.2
FLOOR = -0.5
"""Of the picture: a merge that breaks every task would squeeze the others."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#888888", "#A0522D")
MARKERS = "osD^vPXp*"


def read_rows(path: Path) -> list[ScoreRow]:
    """Return the scores of a pipeline's `results.parquet`."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    return [ScoreRow(**{**row, "seen": bool(row.get("seen", True))}) for row in rows]


def curves_of(tables: Mapping[int, Sequence[ScoreRow]]) -> Curves:
    """Return the mean gain that each method keeps in each table, by what the tables count.

    Of a method with a tuned row that one is shown.
    """
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for count, rows in sorted(tables.items()):
        for method, own in _merges(rows).items():
            points[method].append((count, fmean(own)))
    return dict(points)


def _merges(rows: Sequence[ScoreRow]) -> dict[str, list[float]]:
    """Return what each merge keeps of the gain of the experts in it, on test data."""
    kept: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for row in rows:
        is_merge = row.split == "test" and row.seen and row.method not in REFERENCES
        if is_merge and is_number(row.gain_kept):
            kept[row.method, row.tuned].append(row.gain_kept)
    # A tuned row comes after the one at its defaults, and takes its place.
    return {method: own for (method, _), own in sorted(kept.items())}


def write_curves(path: Path, panels: Mapping[str, Curves]) -> None:
    """Write one PNG with a panel for each axis, named by what it counts."""
    methods = sorted({method for curves in panels.values() for method in curves})
    styles = {
        method: {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]}
        for n, method in enumerate(methods)
    }

    def draw(figure: Figure) -> None:
        columns = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        lines = {}
        for axes, (name, curves) in zip(columns, panels.items(), strict=True):
            for method, points in curves.items():
                x, y = zip(*((x, max(FLOOR, y)) for x, y in points), strict=True)
                lines[method] = axes.plot(x, y, linewidth=1.3, markersize=5, **styles[method])[0]
            counts = sorted({x for points in curves.values() for x, _ in points})
            logarithmic(axes, "x")
            axes.set_xticks(counts, [f"{count:,}" for count in counts])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.axhline(0, color="#888888", linewidth=0.8, linestyle="--")
            axes.set_xlabel(name)
        columns[0].set_ylabel("share of the experts' gain that is kept")
        figure.legend(
            [lines[method] for method in methods],
            methods,
            loc="outside upper center",
            ncols=5,
            frameon=False,
        )

    png(path, HEIGHT, draw)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the curves of some tables; return the exit code."""
    parser = argparse.ArgumentParser(description="Draw what merges keep, over two counts.")
    parser.add_argument("out", type=Path, help="the picture")
    parser.add_argument("--experts", nargs="*", default=[], help="tables as COUNT=FILE")
    parser.add_argument("--inputs", nargs="*", default=[], help="the same, over inputs a task")
    options = parser.parse_args(arguments)
    asked = {"experts merged": options.experts, "unlabelled inputs a task": options.inputs}
    panels = {name: curves_of(dict(map(_table, files))) for name, files in asked.items() if files}
    write_curves(options.out, panels)
    return 0


def _table(said: str) -> tuple[int, list[ScoreRow]]:
    count, _, path = said.partition("=")
    return int(count), read_rows(Path(path))


if __name__ == "__main__":
    sys.exit(main())
