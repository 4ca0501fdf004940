"""Pictures of learned merges: ratios before and after, quartiles, shares of experts, losses."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icm_ray.report.data import LearnedRow, Table, TrainingCurve
from icm_ray.report.pictures import LINES, draw_heat, label_height, logarithmic, svg
from icm_ray.report.text import clip, short_modules

LINES_SHOWN = 5
"""Learned rows of one picture; the best ones by mean."""
COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#888888", "#B2A100")
PART = 0.55
"""Height of a panel's title and margins, in inches."""


def change_picture(base: Table, others: Mapping[str, Table]) -> str:
    """Return heat maps, task by module: the base's ratios, and how experts and merges differ.

    Args:
        base: Ratio by task and module under the base's features.
        others: The same under the features of the experts and of merges, by their label.
    """
    modules = short_modules(module for row in base.values() for module in row)
    tasks = sorted(base)

    def values(table: Table) -> np.ndarray:
        return np.array([[table.get(t, {}).get(m, np.nan) for m in modules] for t in tasks], float)

    before = values(base)
    changes = {name: values(table) - before for name, table in others.items()}
    bound = max(float(np.nanmax(np.abs(c), initial=0.001)) for c in changes.values())

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1 + len(changes), 1, sharex=True)
        draw_heat(panels[0], before, tasks, [], "cividis", _bounds(before))
        panels[0].set_title("base", loc="left")
        for axes, (name, change) in zip(panels[1:], changes.items(), strict=True):
            columns = list(modules.values()) if axes is panels[-1] else []
            draw_heat(axes, change, tasks, columns, "PuOr", (-bound, bound))
            axes.set_title(f"{clip(name)} minus base", loc="left")

    height = (1 + len(changes)) * (PART + 0.2 * len(tasks)) + label_height(modules)
    return svg("changes", height, draw)


def quartile_picture(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return a panel per task: accuracy from the lowest quarter of ratios to the highest."""
    tasks = sorted({task for row in scores.values() for task in row})

    def draw(figure: Figure) -> None:
        panels = _panels(figure, len(tasks))
        colours = iter(COLOURS)
        for name, by_task in scores.items():
            colour, style = LINES[name] if name in LINES else (next(colours), "-")
            for axes, task in zip(panels, tasks, strict=True):
                values = by_task.get(task, [])
                places = range(1, len(values) + 1)
                axes.plot(places, values, style, color=colour, marker="o", ms=3, label=clip(name))
        for axes, task in zip(panels, tasks, strict=True):
            axes.set_title(clip(task), loc="left")
            axes.set_xticks([1, 2, 3, 4], ["lowest", "2", "3", "highest"])
            axes.grid(axis="y", alpha=0.3)
        _legend(figure, panels[0])

    return svg("quartiles", _height(len(tasks)), draw)


def training_picture(curves: Mapping[str, TrainingCurve]) -> str:
    """Return a row of panels for classes and one for the rest: ratio, loss and score by step."""
    grouped: dict[str, list[str]] = {}
    for task in sorted(curves):
        name = "classes" if "class" in curves[task].kind else curves[task].kind.replace("_", " ")
        grouped.setdefault(name, []).append(task)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(grouped), 3, squeeze=False)
        for panels, (kind, tasks) in zip(grid, sorted(grouped.items()), strict=True):
            for colour, task in zip(colours_of(tasks), tasks, strict=True):
                curve = curves[task]
                shown = {"ratio": curve.ratios, "loss": curve.losses, "score": curve.scores}
                for axes, (name, values) in zip(panels, shown.items(), strict=True):
                    axes.plot(curve.steps, values, color=colour, marker="o", ms=3, label=clip(task))
                    axes.set_title(f"{name}, {kind}", loc="left")
            for axes in panels:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.grid(axis="y", alpha=0.3)
            panels[-1].legend(fontsize="small")
        for axes in grid[-1]:
            axes.set_xlabel("step")

    return svg("training", 0.6 + 2.4 * len(grouped), draw)


def learned_picture(row: LearnedRow) -> str:
    """Return a heat map of the experts' shares, and under it each task's loss over the steps."""
    modules = short_modules(module for shares in row.shares.values() for module in shares)
    tasks = sorted(row.shares)
    values = np.array([[row.shares[t].get(m, np.nan) for m in modules] for t in tasks], float)
    learned = {task: losses for task, losses in sorted(row.history.items()) if len(losses)}

    def draw(figure: Figure) -> None:
        heights = [PART + 0.27 * len(tasks), 2.4]
        above, below = figure.subplots(2, 1, height_ratios=heights)
        if values.size:
            draw_heat(above, values, tasks, list(modules.values()), "cividis", _bounds(values))
        else:  # a joint LoRA holds no share of any expert
            above.remove()
        for colour, (task, losses) in zip(colours_of(learned), learned.items(), strict=True):
            below.plot(losses, color=colour, alpha=0.25, linewidth=0.7)
            below.plot(_running(losses), color=colour, linewidth=1.4, label=clip(task))
        below.set_xlabel("step")
        below.set_ylabel("loss")
        low = min((min(losses) for losses in learned.values()), default=1.0)
        high = max((max(losses) for losses in learned.values()), default=1.0)
        if 0 < low < high / 20:
            logarithmic(below, "y")
        below.grid(axis="y", alpha=0.3)
        if learned:
            _legend(figure, below)

    return svg("learned", PART + 0.27 * len(tasks) + label_height(modules) + 3.2, draw)


def _running(losses: Sequence[float]) -> list[float]:
    """Return the mean over each step and up to nine before it: batches differ, and noise hides."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - 10, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _bounds(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and largest value, a little apart if they are one."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return (low, high) if high - low > 1e-9 else (low - 0.01, high + 0.01)


def colours_of(names: Collection[str]) -> list[str]:
    """Return a colour for each name; with more than there are, they come again."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _panels(figure: Figure, count: int) -> list[Axes]:
    across = min(3, count)
    grid = figure.subplots(-(-count // across), across, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return grid[:count]


def _height(count: int) -> float:
    return 0.6 + 2.0 * -(-count // 3)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(handles), 6)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
