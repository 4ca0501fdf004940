"""What a merge costs: CPU time, memory and error beside PEFT, and memory over many adapters."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icm_ray.config import BenchmarkRecipe
from icm_ray.distributed.benchmark_memory import (
    ManyRow,
    PeakMemory,
    many_adapters,
    random_adapter,
    whole_model,
)
from icm_ray.errors import RecipeError
from icm_ray.files import refuse_foreign, whole_folder, write_json
from icm_ray.methods import METHODS
from icm_ray.methods.cut import RankRule, cut
from icm_ray.methods.merge import merge
from icm_ray.types import Adapter, ModuleContext

COMPARED = ("cat", "svd")
OURS, ALONE, PEFT = "merge", "its arithmetic", "PEFT"
"""The whole call with checks, norms and hashes; the method and the cut in it; PEFT's call."""
WARM_UP = {"q_proj": [48, 32], "v_proj": [16, 32]}

Factors = dict[str, tuple[Tensor, Tensor]]
"""`(b, a)` by layer."""


@dataclass(frozen=True)
class Measured:
    """One side of one comparison.

    Attributes:
        method: Name of the method on both sides.
        side: Who merged.
        cpu_seconds: Of each call, one thread.
        median: Of `cpu_seconds`.
        peak_bytes: Resident memory above the start, its result included; None if unknown.
        error: Relative Frobenius error to the float64 truth, the worst layer.
        ratio: PEFT's median CPU seconds over this side's.
    """

    method: str
    side: str
    cpu_seconds: tuple[float, ...]
    median: float
    peak_bytes: int | None
    error: float
    ratio: float = 1.0


@dataclass(frozen=True)
class Side:
    """What one side's turn calls, and what makes it ready for the next one, unmeasured."""

    call: Callable[[], Factors]
    tidy: Callable[[], object] = lambda: None


def run_benchmark(recipe: BenchmarkRecipe, target: Path) -> dict[str, Any]:
    """Run the parts the recipe names, print their tables and write `benchmark.md`.

    Every measurement runs in a fresh process, so that none inherits another's memory.
    """
    if unknown := sorted(set(recipe.methods) - set(COMPARED)):
        raise RecipeError(
            f"methods: {', '.join(unknown)} but {' and '.join(COMPARED)} can be compared."
        )
    refuse_foreign(target)
    rows = [row for method in recipe.methods for row in in_fresh_process(compare, recipe, method)]
    whole = in_fresh_process(whole_model, recipe) if recipe.whole_model else None
    memory = many_adapters(recipe, in_fresh_process) if recipe.many else []
    tables = _tables(recipe, rows, whole, memory)
    _show(tables)
    found = {
        "peft": [asdict(row) for row in rows],
        "whole_model": whole,
        "many": [asdict(row) for row in memory],
    }
    with whole_folder(target) as folder:
        (folder / "benchmark.md").write_text(_markdown(tables))
        write_json(folder / "measured.json", found)
    return {"outputs": {"tables": str(target / "benchmark.md")}, "scores": found}


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, run by a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def compare(recipe: BenchmarkRecipe, method: str) -> list[Measured]:
    """Merge the same adapters by turns, ours then PEFT's, and measure every call."""
    torch.set_num_threads(1)
    small = [random_adapter(WARM_UP, f"task{k}", 2, 0) for k in range(2)]
    for side in _sides(method, small, 2).values():
        side.call()  # libraries load their kernels at the first call
    names = [f"task{k}" for k in range(recipe.adapters)]
    adapters = [random_adapter(recipe.layers, name, recipe.rank, recipe.seed) for name in names]
    sides = _sides(method, adapters, recipe.rank)
    turns = {OURS: recipe.repeats, ALONE: recipe.repeats}
    turns[PEFT] = recipe.peft_repeats.get(method, recipe.repeats)
    truth = true_merge(method, adapters, recipe.rank)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int | None] = {}
    errors: dict[str, float] = {}
    for turn in range(recipe.repeats):
        for name, side in sides.items():
            if turn >= turns[name]:
                continue
            # The first call of a side finds no memory to reuse, so it alone tells the peak.
            with PeakMemory(wanted=turn == 0) as peak:
                started = time.process_time()
                found = side.call()
                seconds[name].append(time.process_time() - started)
            if turn == 0:
                peaks[name] = peak.extra_bytes
                errors[name] = max(relative_error(found[n], truth[n]) for n in truth)
            del found
            side.tidy()
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        Measured(
            method, n, tuple(seconds[n]), middle[n], peaks[n], errors[n], middle[PEFT] / middle[n]
        )
        for n in sides
    ]


def _sides(method: str, adapters: Sequence[Adapter], rank: int) -> dict[str, Side]:
    """Return what is measured; everything the calls need is loaded already."""
    layers = adapters[0].modules
    tasks = tuple(adapter.name for adapter in adapters)
    kept = rank if method == "svd" else None
    rule = RankRule.parse(kept, METHODS[method].default_rank, rank)

    def ours() -> Factors:
        merged = merge(adapters, method, output_rank=kept).adapter
        return {layer: (f.b, f.a) for layer, f in merged.modules.items()}

    def alone() -> Factors:
        found = {}
        with torch.no_grad():
            for layer in layers:
                factors = [adapter.modules[layer] for adapter in adapters]
                context = ModuleContext(layer, tasks, tasks)
                merged = cut(METHODS[method].function(factors, context=context), rule).factors
                found[layer] = (merged.b, merged.a)
        return found

    return {OURS: Side(ours), ALONE: Side(alone), PEFT: _peft_side(method, adapters, rank)}


def _peft_side(method: str, adapters: Sequence[Adapter], rank: int) -> Side:
    """Return PEFT's call on a module of plain linear layers that holds every adapter."""
    from peft import LoraConfig, get_peft_model

    shapes = {layer: factors.shape for layer, factors in adapters[0].modules.items()}
    base: Any = nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (o, i) in shapes.items()})
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(shapes), init_lora_weights=False
    )
    names = [adapter.name for adapter in adapters]
    model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for adapter in adapters:
        for layer, factors in adapter.modules.items():
            base[layer].lora_A[adapter.name].weight.data.copy_(factors.a)
            base[layer].lora_B[adapter.name].weight.data.copy_(factors.b)
    weights = [1 / len(names)] * len(names)
    options = {"combination_type": method, **({"svd_rank": rank} if method == "svd" else {})}

    def call() -> Factors:
        model.add_weighted_adapter(names, weights, "merged", **options)
        layers = {n: (base[n].lora_B["merged"], base[n].lora_A["merged"]) for n in shapes}
        return {n: (b.weight.detach(), a.weight.detach()) for n, (b, a) in layers.items()}

    return Side(call, tidy=lambda: model.delete_adapter("merged"))


def true_merge(method: str, adapters: Sequence[Adapter], rank: int) -> Factors:
    """Return the exact average as float64 factors, by another route than the one we measure."""
    found = {}
    for layer in adapters[0].modules:
        factors = [adapter.modules[layer] for adapter in adapters]
        b = torch.cat([f.b.double() for f in factors], dim=1) / len(factors)
        a = torch.cat([f.a.double() for f in factors])
        if method == "svd":
            qb, rb = torch.linalg.qr(b)
            qa, ra = torch.linalg.qr(a.T)
            u, s, vh = torch.linalg.svd(rb @ ra.T)
            b, a = qb @ (u[:, :rank] * s[:rank]), vh[:rank] @ qa.T
        found[layer] = (b, a)
    return found


def relative_error(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """Return `|found - truth| / |truth|` of the products, from QRs and so without squaring."""
    b = torch.cat([found[0].double(), -truth[0]], dim=1)
    a = torch.cat([found[1].double(), truth[1]])
    return _norm(b, a) / _norm(*truth)


def _norm(b: Tensor, a: Tensor) -> float:
    return float(torch.linalg.norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T))


Table = tuple[str, list[str], list[list[str]]]
"""Title, heads and rows."""


def _tables(
    recipe: BenchmarkRecipe,
    rows: Sequence[Measured],
    whole: Mapping[str, Any] | None,
    memory: Sequence[ManyRow],
) -> list[Table]:
    tables: list[Table] = []
    shapes = ", ".join(f"{n} {o} x {i}" for n, (o, i) in recipe.layers.items())
    if rows:
        title = f"{recipe.adapters} adapters of rank {recipe.rank} ({shapes}), float32, one thread"
        heads = ["method", "side", "CPU ms (median)", "calls", "PEFT / side", "extra MB", "error"]
        tables.append((title, heads, [_compared_cells(row) for row in rows]))
    if whole:
        title = f"{recipe.adapters} adapters of {whole['modules']} modules: read and merged by svd"
        heads = ["MB read", "wall s", "CPU s", "of it reading", "extra MB"]
        times = [whole["wall_seconds"], whole["cpu_seconds"], whole["cpu_seconds_reading"]]
        cells = [_mega(whole["bytes_read"]), *(f"{value:.2f}" for value in times)]
        cells.append(_mega(whole["peak_bytes"]))
        tables.append((title, heads, [cells]))
    if memory:
        o, i = recipe.many_shape
        title = f"Many adapters of {recipe.many_modules} modules {o} x {i}: peak PSS in MB"
        heads = ["method", "adapters", "input", "all ours", "net of bare workers"]
        heads += ["driver", "workers", "net growth", "wall s"]
        tables.append((title, heads, [_many_cells(row) for row in memory]))
    return tables


def _compared_cells(row: Measured) -> list[str]:
    times = [f"{1000 * row.median:.1f}", str(len(row.cpu_seconds)), f"{row.ratio:,.1f}x"]
    return [row.method, row.side, *times, _mega(row.peak_bytes), f"{row.error:.1e}"]


def _many_cells(row: ManyRow) -> list[str]:
    sizes = [_mega(size) for size in (row.input_bytes, row.peak, row.net, row.driver)]
    last = [str(row.workers), f"{row.growth:.2f}x", f"{row.seconds:.1f}"]
    return [row.method, str(row.adapters), *sizes, *last]


def _mega(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def _show(tables: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    for title, heads, rows in tables:
        table = RichTable(title=title, box=None)
        for index, head in enumerate(heads):
            table.add_column(head, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def _markdown(tables: Sequence[Table]) -> str:
    parts = []
    for title, heads, rows in tables:
        lines = [heads, ["---"] * len(heads), *rows]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"
