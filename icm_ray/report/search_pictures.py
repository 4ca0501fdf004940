"""Pictures of a search: its history, what mattered, and the front of two objectives.

Import this module lazily: it needs matplotlib.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icm_ray.report.pictures import logarithmic, png, svg
from icm_ray.report.search_data import Objective, SearchData, TrialRow
from icm_ray.report.text import clip

COMPLETE, STOPPED, BEST, FAILED = "#2089CC", "#888888", "#D55E00", "#CC79A7"
AREA = "#009E73"
FRONT_HEIGHT = 4.2
WIDE = 50
"""From this ratio of largest to smallest value on, an axis counts orders of magnitude."""


def history_picture(data: SearchData) -> str:
    """Return each trial's first objective in the order of the trials, and the best so far."""
    name = data.objectives[0].name

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _dots(
            axes, [t for t in data.trials if t.state == "stopped"], name, STOPPED, "stopped early"
        )
        done = [t for t in data.trials if t.state == "complete"]
        _dots(axes, done, name, COMPLETE, "complete")
        failed = [t.number for t in data.trials if t.state == "failed"]
        if failed:
            axes.plot(
                failed,
                [0.02] * len(failed),
                "x",
                color=FAILED,
                label="failed",
                transform=axes.get_xaxis_transform(),
            )
        if done:
            best = _best_so_far([t.metrics[name] for t in done], data.objectives[0])
            numbers = [t.number for t in done]
            axes.step(numbers, best, where="post", color=BEST, linewidth=1.3, label="best so far")
        axes.set_xlabel("trial")
        axes.set_ylabel(clip(name))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=4, frameon=False)

    return svg("history", 3.6, draw)


def importance_picture(importance: Mapping[str, float]) -> str:
    """Return one bar a searched name: the share of the variance it explains."""
    names = sorted(importance, key=lambda name: -importance[name])[:20]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(range(len(names)), [importance[n] for n in names], color=COMPLETE, height=0.6)
        axes.set_yticks(range(len(names)), [clip(n, 36) for n in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("share of the variance of the first objective")

    return svg("importance", 0.7 + 0.28 * len(names), draw)


def front_picture(data: SearchData) -> str:
    """Return all complete trials by their first two objectives, those on the front marked."""
    return svg("front", FRONT_HEIGHT, lambda figure: _draw_front(figure, data))


def write_front(data: SearchData, path: Path) -> None:
    """Write `front_picture` as a PNG, for slides and documents that show no SVG."""
    png(path, FRONT_HEIGHT, lambda figure: _draw_front(figure, data))


def _draw_front(figure: Figure, data: SearchData) -> None:
    one, two = data.objectives[:2]
    axes = figure.subplots()
    done = [t for t in data.trials if t.state == "complete"]
    beaten = [t for t in done if t.number not in data.front]
    front = [t for t in done if t.number in data.front]
    for trials, colour, label in (
        (beaten, COMPLETE, "beaten in every objective"),
        (front, BEST, "front"),
    ):
        x, y = ([t.metrics[o.name] for t in trials] for o in (two, one))
        axes.plot(x, y, "o", color=colour, markersize=4.5, label=label)
    for trial in front:
        place = (trial.metrics[two.name], trial.metrics[one.name])
        axes.annotate(str(trial.number), place, (4, 4), textcoords="offset points", fontsize=8)
    for objective, which in ((two, "x"), (one, "y")):
        values = [t.metrics[objective.name] for t in done]
        if values and min(values) > 0 and max(values) > WIDE * min(values):
            logarithmic(axes, which)
    axes.set_xlabel(f"{clip(two.name)} ({two.better})")
    axes.set_ylabel(f"{clip(one.name)} ({one.better})")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


def _dots(axes: Axes, trials: Sequence[TrialRow], name: str, colour: str, label: str) -> None:
    known = [t for t in trials if name in t.metrics]
    if known:
        values = [t.metrics[name] for t in known]
        axes.plot([t.number for t in known], values, "o", color=colour, markersize=4, label=label)


def _best_so_far(values: Sequence[float], objective: Objective) -> list[float]:
    choose, found = max if objective.better == "higher is better" else min, []
    for value in values:
        found.append(choose([*found[-1:], value]))
    return found
