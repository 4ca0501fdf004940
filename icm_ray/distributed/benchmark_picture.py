"""The curve of a merge of many adapters: memory and time over their number."""

from collections.abc import Sequence
from pathlib import Path

from icm_ray.distributed.benchmark_memory import ManyRow


def draw_many(rows: Sequence[ManyRow], path: Path) -> None:
    """Write a PNG with a line a method: peak memory net of bare workers, and wall seconds.

    The input's own size is drawn beside the memory, since that is what grows with the adapters.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(1, 2)
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        counts = [row.adapters for row in own]
        memory.plot(counts, [row.net / 1e6 for row in own], marker="o", label=method)
        time.plot(counts, [row.seconds for row in own], marker="o", label=method)
    sizes = {row.adapters: row.input_bytes / 1e6 for row in rows}
    memory.plot(list(sizes), list(sizes.values()), "k--", label="size of the adapters")
    for axes, title, unit in ((memory, "peak memory", "MB"), (time, "wall time", "seconds")):
        axes.set_title(title)
        axes.set_xlabel("adapters merged")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    memory.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
