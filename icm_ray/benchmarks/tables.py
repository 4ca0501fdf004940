"""The benchmark's measurements as tables: on the terminal and in `benchmark.md`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.benchmarks.command import STAGES, CommandRow
from icm_ray.benchmarks.fusion import FusionRow
from icm_ray.benchmarks.learning import StepRow
from icm_ray.config import BenchmarkRecipe
from icm_ray.distributed.memory import ManyRow

WHOLE_GOAL = "< 2 s wall, reading included (P10)"


@dataclass(frozen=True)
class Measured:
    """One side of one comparison.

    Attributes:
        method: Name of the comparison.
        side: Who merged.
        cpu_seconds: Of each call, one thread.
        median: Of `cpu_seconds`.
        peak_bytes: Resident memory above the start, its result included; None if unknown.
        error: How far the result is off, the worst layer; `judged` says from what. None where
            there is nothing to compare with.
        judged: "truth" or "peer": relative Frobenius distance to it. "residual": relative residual
            of the cut, less the smallest one possible. "noise": distance to the expected merge
            over what random masks make of it in theory.
        ratio: The peer's median CPU seconds over this side's.
        memory_ratio: The peer's peak memory over this side's; None if unknown.
        goal: What is asked of our ratio and result.
    """

    method: str
    side: str
    cpu_seconds: tuple[float, ...]
    median: float
    peak_bytes: int | None
    error: float | None
    judged: str = "truth"
    ratio: float = 1.0
    memory_ratio: float | None = None
    goal: str = ""


Table = tuple[str, list[str], list[list[str]]]
"""Title, heads and rows."""


def as_tables(
    recipe: BenchmarkRecipe,
    rows: Sequence[Measured],
    whole: Mapping[str, Any] | None,
    memory: Sequence[ManyRow],
    steps: Sequence[StepRow] = (),
    fusion: Sequence[FusionRow] = (),
    commands: Sequence[CommandRow] = (),
) -> list[Table]:
    """Return a table for each part of the benchmark that was run."""
    tables: list[Table] = []
    shapes = ", ".join(f"{n} {o} x {i}" for n, (o, i) in recipe.layers.items())
    if rows:
        title = f"{recipe.adapters} adapters of rank {recipe.rank} ({shapes}), float32, one thread"
        heads = ["method", "side", "CPU ms (median)", "calls", "peer / side", "goal"]
        heads += ["extra MB", "peer / side MB", "result"]
        tables.append((title, heads, [_compared_cells(row) for row in rows]))
    if whole:
        title = f"{recipe.adapters} adapters of {whole['modules']} modules: read and merged by svd"
        heads = ["MB read", "wall s", "CPU s", "of it reading", "extra MB", "goal"]
        times = [whole["wall_seconds"], whole["cpu_seconds"], whole["cpu_seconds_reading"]]
        cells = [_mega(whole["bytes_read"]), *(f"{value:.2f}" for value in times)]
        cells += [_mega(whole["peak_bytes"]), WHOLE_GOAL]
        tables.append((title, heads, [cells]))
    if memory:
        o, i = recipe.many_shape
        title = f"Many adapters of {recipe.many_modules} modules {o} x {i}: peak PSS in MB"
        heads = ["method", "adapters", "input", "all ours", "net of bare workers"]
        heads += ["driver", "workers", "net growth", "wall s"]
        tables.append((title, heads, [_many_cells(row) for row in memory]))
    if steps:
        title = "A learning step of all tasks: CPU ms (median), one thread, float32"
        heads = ["comparison", "tokens", "adapters", "ours", "straightforward", "ratio"]
        heads += ["our start", "gradient off", "goal"]
        tables.append((title, heads, [_step_cells(row) for row in steps]))
    if fusion:
        title = "A training step of a Fusion-VAE: CPU ms an adapter (median), one thread, float32"
        heads = ["size", "network", "LoRA numbers", "numbers it sees", "its parameters"]
        heads += ["layout s", "step ms", "conv / this", "extra MB", "goal"]
        conv = {(r.label, r.numbers): r.seconds for r in fusion if r.preset == "conv"}
        cells = [_fusion_cells(row, conv[row.label, row.numbers]) for row in fusion]
        tables.append((title, heads, cells))
    if commands:
        title = f"Whole commands, {recipe.adapters} adapters of rank {recipe.rank}: seconds"
        heads = ["adapters", "method", "MB read", "wall", "CPU", "opening", "merging", "writing"]
        heads += ["at least", "CPU / least", "plan's CPU", "import torch", "goal"]
        tables.append((title, heads, [_command_cells(row) for row in commands]))
    return tables


def _command_cells(row: CommandRow) -> list[str]:
    times = [f"{value:.1f}" for value in (row.wall, row.cpu)]
    times += [f"{row.stages[part]:.1f}" if row.stages else "-" for part in STAGES]
    least = sum(row.least.values())
    parts = " + ".join(f"{value:.1f} {part}" for part, value in row.least.items())
    times += [f"{least:.1f} ({parts})", f"{row.cpu / least:.1f}x"] if row.least else ["-", "-"]
    last = [f"{row.plan:.1f}", f"{row.start:.1f}", row.goal]
    return [row.label, row.method, _mega(row.bytes_read), *times, *last]


def _fusion_cells(row: FusionRow, conv: float) -> list[str]:
    sizes = [f"{value:,}" for value in (row.numbers, row.size, row.parameters)]
    times = [
        f"{row.layout_seconds:.1f}",
        f"{1000 * row.seconds:.2f}",
        f"{conv / row.seconds:,.0f}x",
    ]
    return [row.label, row.preset, *sizes, *times, _mega(row.peak_bytes), row.goal]


def _step_cells(row: StepRow) -> list[str]:
    times = [f"{1000 * value:.1f}" for value in (row.ours, row.peer)]
    last = [f"{row.peer / row.ours:,.1f}x", f"{1000 * row.start:.1f}", f"{row.off:.1e}", row.goal]
    return [row.label, str(row.tokens), str(row.adapters), *times, *last]


def _compared_cells(row: Measured) -> list[str]:
    times = [f"{1000 * row.median:.1f}", str(len(row.cpu_seconds)), f"{row.ratio:,.1f}x"]
    memory = "-" if row.memory_ratio is None else f"{row.memory_ratio:,.1f}x"
    sizes = [_mega(row.peak_bytes), memory]
    return [row.method, row.side, *times, row.goal, *sizes, _judgement(row)]


def _judgement(row: Measured) -> str:
    if row.error is None:
        return "-"
    if row.judged == "noise":
        return f"noise {row.error:.4f} of theory's"
    if row.judged == "residual":
        return f"residual {row.error:+.1e}"
    return f"off {row.judged} {row.error:.1e}"


def _many_cells(row: ManyRow) -> list[str]:
    sizes = [_mega(size) for size in (row.input_bytes, row.peak, row.net, row.driver)]
    last = [str(row.workers), f"{row.growth:.2f}x", f"{row.seconds:.1f}"]
    return [row.method, str(row.adapters), *sizes, *last]


def _mega(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def show(tables: Sequence[Table]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table as RichTable

    # A pipe has no width; lines of a table must not break there.
    console = Console(width=None if sys.stdout.isatty() else 180)
    for title, heads, rows in tables:
        table = RichTable(title=title, box=None)
        for index, head in enumerate(heads):
            table.add_column(head, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def as_markdown(tables: Sequence[Table]) -> str:
    """Return the tables as Markdown."""
    parts = []
    for title, heads, rows in tables:
        lines = [heads, ["---"] * len(heads), *rows]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


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
