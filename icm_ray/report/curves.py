"""Curves of what merges keep, over the number of experts and of unlabelled inputs.

    python -m icm_ray.report.curves OUT.png --experts 2=k2/results.parquet 4=k4/results.parquet \
        --inputs 16=inputs16/results.parquet

Each table is a pipeline's `results.parquet`. Import this module lazily: it needs matplotlib.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from icm_ray.report.data import BASE, EXPERT, ScoreRow, is_reference
from icm_ray.report.learned_pictures import colours_of
from icm_ray.report.pictures import logarithmic, png

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Points by method, in the order of their first axis."""

HEIGHT = 4.2
FLOOR = -0.5
"""Of the picture: a merge that breaks every task would squeeze the others."""
MARKERS = "osD^vPXp*"


def read_rows(path: Path) -> list[ScoreRow]:
    """Return the scores of a pipeline's `results.parquet`."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    return [ScoreRow(**{**row, "seen": bool(row.get("seen", True))}) for row in rows]


def curves_of(tables: Mapping[int, Sequence[ScoreRow]]) -> Curves:
    """Return what each method keeps in each table, by what the tables count.

    Of a method with a tuned row that one is shown.
    """
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for count, rows in sorted(tables.items()):
        # A tuned row comes after the one at its defaults, and takes its place.
        last = {method: kept for (method, _), kept in sorted(gain_kept(rows).items())}
        for method, kept in last.items():
            points[method].append((count, kept))
    return dict(points)


def gain_kept(rows: Sequence[ScoreRow], *, seen: bool = True) -> dict[tuple[str, bool], float]:
    """Return the share of the experts' gain that each merge keeps on test data, all tasks together.

    Gains over the base are summed before they are divided: with many tasks some experts have gained
    so little that a share of theirs alone is noise. Tasks without a gain are left out.

    Args:
        rows: The scores of one set of experts, with those of the experts and of the base.
        seen: Count the tasks whose experts were merged, or the others.

    Returns:
        The share by method and whether it was tuned.
    """
    test = [row for row in rows if row.split == "test"]
    known = {(row.method, row.task): row.score for row in test if row.method in (BASE, EXPERT)}
    gains = {t: known[EXPERT, t] - known[BASE, t] for method, t in known if method == EXPERT}
    sums: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
    for row in test:
        gain = gains.get(row.task, 0.0)
        if not is_reference(row.method) and row.seen == seen and gain > 0:
            sums[row.method, row.tuned].append((row.score - known[BASE, row.task], gain))
    return {
        merge: sum(kept for kept, _ in found) / sum(gain for _, gain in found)
        for merge, found in sums.items()
    }


def write_curves(path: Path, panels: Mapping[str, Curves]) -> None:
    """Write one PNG with a panel for each axis, named by what it counts."""
    methods = sorted({method for curves in panels.values() for method in curves})
    styles = {
        method: {"color": colour, "marker": MARKERS[n % len(MARKERS)]}
        for n, (method, colour) in enumerate(zip(methods, colours_of(methods), strict=True))
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
        columns[0].set_ylabel(f"share of the experts' gain that is kept (at least {FLOOR})")
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
    said = [*options.experts, *options.inputs]
    strange = [one for one in said if not re.fullmatch(r"\d+=.+", one)]
    if strange or not said:
        parser.error(
            f"COUNT=FILE is wanted after --experts or --inputs, not {strange or 'nothing'}"
        )
    asked = {"experts merged": options.experts, "unlabelled inputs a task": options.inputs}
    panels = {name: curves_of(dict(map(_table, files))) for name, files in asked.items() if files}
    write_curves(options.out, panels)
    return 0


def _table(said: str) -> tuple[int, list[ScoreRow]]:
    count, _, path = said.partition("=")
    return int(count), read_rows(Path(path))


if __name__ == "__main__":
    sys.exit(main())
