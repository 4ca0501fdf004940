"""Pictures as SVG text: the same input gives the same bytes, in a light and in a dark page.

Import this module lazily: it needs matplotlib. Colours (Okabe and Ito's, cividis, PuOr) are told
apart by colour-blind readers too.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, MaxNLocator, StrMethodFormatter
from matplotlib.typing import LineStyleType
from numpy.typing import NDArray

from icm_ray.report.data import BASE, EXPERT, PROBE, REFERENCES, ScoreRow, Table
from icm_ray.report.text import clip, is_number, short_modules

WIDTH = 10.0
PNG_DPI = 110
INK = "#1a2b3c"
"""Stands for the page's own text colour and is replaced by it in the finished picture."""
MAX_COLUMN_LABELS = 50
FLOOR = -0.25
"""Scores below become an arrow at the edge: R2 has no lower end and would squeeze the rest."""
LINES: dict[str, tuple[str, LineStyleType]] = {
    EXPERT: ("#009E73", "-"),
    PROBE: ("#CC79A7", ":"),
    BASE: ("#888888", "--"),
}
DOTS = {False: ("default parameters", "#2089CC", "o"), True: ("tuned", "#D55E00", "D")}

Draw = Callable[[Figure], None]


def score_picture(rows: Sequence[ScoreRow], methods: Sequence[str]) -> str:
    """Return a panel per task with a dot and its interval for each method and expert set.

    Args:
        rows: Scores of one init and split; the references become vertical lines.
        methods: The merges to show, from top to bottom.
    """
    tasks = sorted({row.task for row in rows})
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
        for axes, task in zip(panels, tasks, strict=False):
            _draw_task(axes, [row for row in rows if row.task == task], methods)
        for axes in panels[len(tasks) :]:
            axes.set_visible(False)
        _draw_legend(figure, rows)

    return svg("scores", down * (0.75 + 0.25 * len(methods)) + 0.5, draw)


def ratio_picture(ratios: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Return heat maps, task by module: the expert's null-space ratio, and its change."""
    modules = short_modules(module for row in ratios.values() for module in row)
    tasks = sorted(ratios)
    nothing = (float("nan"), float("nan"))
    values = np.array([[ratios[t].get(m, nothing) for m in modules] for t in tasks], dtype=float)
    expert, change = values[..., 1], values[..., 1] - values[..., 0]
    bound = float(np.nanmax(np.abs(change), initial=0.01))

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        draw_heat(above, expert, tasks, [], "cividis", (0.0, 1.0))
        draw_heat(below, change, tasks, list(modules.values()), "PuOr", (-bound, bound))
        above.set_title("ratio with the expert's features", loc="left")
        below.set_title("change: expert minus base", loc="left")

    return svg("ratios", 2 * (0.55 + 0.27 * len(tasks)) + label_height(modules), draw)


def cosine_picture(matrices: Mapping[str, Table]) -> str:
    """Return one annotated matrix of cosines beside the other, by title."""

    def draw(figure: Figure) -> None:
        columns = figure.subplots(1, max(2, len(matrices)), squeeze=False)[0]
        for axes in columns[len(matrices) :]:
            axes.set_visible(False)
        for axes, (title, table) in zip(columns, matrices.items(), strict=False):
            _draw_cosines(axes, table)
            axes.set_title(title, loc="left")

    return svg("cosines", 1.0 + WIDTH * 0.4, draw)


def module_picture(name: str, table: Table, bounds: tuple[float, float] | None = None) -> str:
    """Return a heat map, method by module, of values from zero, such as the retained energy."""
    modules = short_modules(module for row in table.values() for module in row)
    values = np.array([[row.get(m, np.nan) for m in modules] for row in table.values()], float)
    bounds = bounds or (0.0, float(np.nanmax(values, initial=1e-9)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        draw_heat(axes, values, list(table), list(modules.values()), "cividis", bounds)

    return svg(name, 0.5 + 0.27 * len(table) + label_height(modules), draw)


def _draw_task(axes: Axes, rows: Sequence[ScoreRow], methods: Sequence[str]) -> None:
    axes.set_title(f"{clip(rows[0].task)} ({clip(rows[0].metric, 14)})", loc="left")
    for method, (colour, style) in LINES.items():
        scores = [row.score for row in rows if row.method == method]
        if scores and np.isfinite(scores).all():
            mean = max(FLOOR, sum(scores) / len(scores))
            axes.axvline(mean, color=colour, linestyle=style, linewidth=1.3)
    sets = sorted({row.expert_set for row in rows})
    both = len({row.tuned for row in rows if row.method not in REFERENCES}) > 1
    for row in rows:
        if row.method in methods and is_number(row.score):
            tuned_shift = (0.2 if row.tuned else -0.2) if both else 0.0
            spread = 0.3 if both else 0.55
            set_shift = spread * (sets.index(row.expert_set) - (len(sets) - 1) / 2) / len(sets)
            _draw_score(axes, row, methods.index(row.method) + tuned_shift + set_shift)
    for i in range(0, len(methods), 2):
        axes.axhspan(i - 0.5, i + 0.5, color="#808080", alpha=0.1, linewidth=0)
    axes.set_yticks(range(len(methods)), [clip(method) for method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _draw_score(axes: Axes, row: ScoreRow, y: float) -> None:
    _, colour, marker = DOTS[row.tuned]
    if row.score < FLOOR:
        axes.plot(FLOOR, y, marker="<", color=colour, markersize=4)
        return
    axes.plot([max(FLOOR, row.low), row.high], [y, y], color=colour, linewidth=0.9, alpha=0.6)
    axes.plot(row.score, y, marker=marker, color=colour, markersize=3.2)


def _draw_legend(figure: Figure, rows: Sequence[ScoreRow]) -> None:
    tuned = sorted({row.tuned for row in rows if row.method not in REFERENCES})
    handles = [
        Line2D([], [], color=DOTS[t][1], marker=DOTS[t][2], markersize=4, label=DOTS[t][0])
        for t in tuned
    ]
    names = {EXPERT: "own expert", PROBE: "linear probe", BASE: "base (LoRA off)"}
    handles += [
        Line2D([], [], color=colour, linestyle=style, label=names[method])
        for method, (colour, style) in LINES.items()
        if any(row.method == method for row in rows)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def draw_heat(
    axes: Axes,
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    bounds: tuple[float, float],
) -> None:
    """Draw a heat map with its colour bar; missing values are hatched."""
    low, high = bounds
    image = axes.imshow(
        values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none"
    )
    _hatch_missing(axes, values)
    axes.set_yticks(range(len(rows)), [clip(row) for row in rows])
    if columns:
        step = -(-len(columns) // MAX_COLUMN_LABELS)
        axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=90, fontsize=8)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12, fraction=0.03)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()


def _hatch_missing(axes: Axes, values: NDArray[np.float64]) -> None:
    """Lay hatching under the cells: a missing value is transparent and lets it show."""
    if np.isfinite(values).all():
        return
    area = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, hatch="////", zorder=-1)
    area.set(edgecolor="#808080", linewidth=0)
    axes.add_patch(area)


def _draw_cosines(axes: Axes, table: Table) -> None:
    tasks = sorted(table)
    values = np.array([[table[a].get(b, np.nan) for b in tasks] for a in tasks], dtype=float)
    axes.imshow(values, cmap="PuOr", vmin=-1, vmax=1, interpolation="none")
    _hatch_missing(axes, values)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.65 else "black"
            axes.text(j, i, f"{value:z.2f}", ha="center", va="center", color=colour, fontsize=8)
    names = [clip(task, 18) for task in tasks]
    axes.set_xticks(range(len(tasks)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(tasks)), names)
    axes.tick_params(length=0)


def label_height(modules: Mapping[str, str]) -> float:
    """Return the inches that upright labels of the modules take."""
    return 0.1 + 0.075 * max(map(len, modules.values()), default=0)


STYLE: dict[Any, object] = {
    "svg.fonttype": "none",  # text stays text: to be searched, copied and read aloud
    "text.parse_math": False,  # a task named "$x" is a name, not a formula
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.spines.bottom": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def svg(name: str, height: float, draw: Draw) -> str:
    """Draw on a fresh figure and return it as SVG text that may stand inside a page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _style({"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height))
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # the XML head may not stand inside HTML
    # Counted ids ("patch_1") repeat from picture to picture and nothing refers to them.
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    return re.sub(INK, "currentColor", text, flags=re.IGNORECASE)


def logarithmic(axes: Axes, which: str) -> None:
    """Let the "x" or "y" axis count orders of magnitude.

    Its numbers are plain ones: Matplotlib writes TeX there, which `svg` shows as it stands.
    """
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(LogFormatter())


def png(path: Path, height: float, draw: Draw) -> None:
    """Draw on a fresh white figure and write it as a PNG."""
    with _style({}):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        figure.savefig(path, format="png", dpi=PNG_DPI, metadata={"Software": None})


@contextlib.contextmanager
def _style(more: Mapping[str, Any]) -> Iterator[None]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A glyph our font lacks is drawn by the reader's browser in its own font.
        warnings.filterwarnings("ignore", message="Glyph")
        matplotlib.rcdefaults()
        settings: Any = {**STYLE, **more}
        matplotlib.rcParams.update(settings)
        yield
