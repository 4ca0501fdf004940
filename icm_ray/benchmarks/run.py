"""What a merge costs: CPU time, memory and result beside peers, and memory over many adapters."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from icm_ray.benchmarks.arithmetic import cut_of, dense_of
from icm_ray.benchmarks.command import whole_command
from icm_ray.benchmarks.comparisons import COMPARISONS, NAIVE, Comparison
from icm_ray.benchmarks.fusion import SIDES, measure_fusion
from icm_ray.benchmarks.judging import judge
from icm_ray.benchmarks.learning import compare_steps
from icm_ray.benchmarks.memory import PeakMemory, many_adapters, random_adapter, whole_model
from icm_ray.benchmarks.peers import Found, Side
from icm_ray.benchmarks.tables import Measured, as_markdown, as_tables, draw_many, show
from icm_ray.config import BenchmarkRecipe
from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.files import refuse_foreign, whole_folder, write_json
from icm_ray.merging.merge import merge_as_asked
from icm_ray.merging.order import MergeOrder, MergeRequest, plan_merge
from icm_ray.methods import METHODS
from icm_ray.types import Adapter

OURS, ALONE, DENSE = "merge", "its arithmetic", "its matrix"
"""The whole call with checks, norms and hashes; the method and the cut in it; the method alone."""


def run(recipe: BenchmarkRecipe, target: Path) -> dict[str, Any]:
    """Run the parts the recipe names, print their tables and write `benchmark.md`.

    Every measurement runs in a fresh process, so that none inherits another's memory.
    """
    check_comparisons(recipe)
    refuse_foreign(target)
    rows = [row for name in recipe.methods for row in in_fresh_process(compare, recipe, name)]
    whole = in_fresh_process(whole_model, recipe) if recipe.whole_model else None
    memory = many_adapters(recipe, in_fresh_process) if recipe.many else []
    steps = [row for how in recipe.learning for row in in_fresh_process(compare_steps, how, recipe)]
    fusion = [
        in_fresh_process(measure_fusion, how, preset, recipe.seed)
        for how in recipe.fusion
        for preset in SIDES
    ]
    commands = [in_fresh_process(whole_command, how, recipe) for how in recipe.commands]
    tables = as_tables(recipe, rows, whole, memory, steps, fusion, commands)
    show(tables)
    measured = {
        "peft": [asdict(row) for row in rows],
        "whole_model": whole,
        "many": [asdict(row) for row in memory],
        "learning": [asdict(row) for row in steps],
        "fusion": [asdict(row) for row in fusion],
        "commands": [asdict(row) for row in commands],
    }
    with whole_folder(target) as folder:
        (folder / "benchmark.md").write_text(as_markdown(tables))
        write_json(folder / "measured.json", measured)
        if memory:
            draw_many(memory, folder / "many.png")
    return {"outputs": {"tables": str(target / "benchmark.md")}, "scores": measured}


def check_comparisons(recipe: BenchmarkRecipe) -> None:
    """Refuse a recipe that names comparisons, methods or layers that do not exist."""
    problems = [
        f"methods: {name!r} is not compared but one of {', '.join(COMPARISONS)} is expected."
        f"{did_you_mean(name, COMPARISONS)}"
        for name in recipe.methods
        if name not in COMPARISONS
    ]
    known = [name for name in recipe.methods if name in COMPARISONS]
    if missing := [name for name in known if COMPARISONS[name].method not in METHODS]:
        problems.append(
            f"methods: {', '.join(missing)}: this version has no such method of ours. "
            "Leave them out."
        )
    for name in known:
        if absent := sorted(set(COMPARISONS[name].layers or ()) - set(recipe.layers)):
            problems.append(f"layers: {', '.join(absent)} missing but {name} is compared on it.")
    if problems:
        raise RecipeError(problems)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, run by a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def compare(recipe: BenchmarkRecipe, name: str) -> list[Measured]:
    """Merge the same adapters by turns, ours then the peer's, and measure every call."""
    torch.set_num_threads(1)
    comparison = COMPARISONS[name]
    shapes = {n: s for n, s in recipe.layers.items() if n in (comparison.layers or recipe.layers)}
    small = _adapters({layer: [24, 32] for layer in shapes}, 2, 2, 0)
    for _, side in _sides(comparison, small, 2, 0)[0]:
        side.call()  # libraries load and compile their kernels at the first call
    adapters = _adapters(shapes, recipe.adapters, recipe.rank, recipe.seed)
    sides, order = _sides(comparison, adapters, recipe.rank, recipe.seed)
    peer = comparison.peer
    turns = {label: recipe.repeats for label, _ in sides}
    turns[peer] = recipe.peft_repeats.get(name, recipe.repeats)
    seconds, peaks, first = _take_turns(sides, turns)
    errors = judge(comparison, adapters, recipe.rank, partial(dense_of, order, adapters), first)
    middle = {label: statistics.median(values) for label, values in seconds.items()}
    return [
        Measured(
            method=name,
            side=label,
            cpu_seconds=tuple(seconds[label]),
            median=middle[label],
            peak_bytes=peaks[label],
            error=errors[label],
            judged=comparison.judged,
            ratio=middle[peer] / middle[label],
            memory_ratio=_over(peaks[peer], peaks[label]),
            goal=comparison.goal if label == sides[0][0] else "",
        )
        for label, _ in sides
    ]


def _take_turns(
    sides: Sequence[tuple[str, Side]], turns: Mapping[str, int]
) -> tuple[dict[str, list[float]], dict[str, int | None], dict[str, Found]]:
    """Return every call's CPU seconds, and the first call's peak memory and result, by side."""
    seconds: dict[str, list[float]] = {label: [] for label, _ in sides}
    peaks: dict[str, int | None] = {}
    first: dict[str, Found] = {}
    for turn in range(max(turns.values())):
        for label, side in sides:
            if turn >= turns[label]:
                continue
            # The first call of a side finds no memory to reuse, so it alone tells the peak.
            with PeakMemory(wanted=turn == 0) as peak:
                started = time.process_time()
                merged = side.call()
                seconds[label].append(time.process_time() - started)
            if turn == 0:
                peaks[label], first[label] = peak.extra_bytes, merged
            del merged
            side.tidy()
    return seconds, peaks, first


def _over(peer: int | None, ours: int | None) -> float | None:
    return peer / ours if peer and ours else None


def _adapters(
    shapes: Mapping[str, Sequence[int]], count: int, rank: int, seed: int
) -> list[Adapter]:
    return [random_adapter(shapes, f"task{k}", rank, seed) for k in range(count)]


def _sides(
    comparison: Comparison, adapters: Sequence[Adapter], rank: int, seed: int
) -> tuple[list[tuple[str, Side]], MergeOrder]:
    """Return what is measured, and our merge as an order; everything is loaded already."""
    layers = {n: [adapter.modules[n] for adapter in adapters] for n in adapters[0].modules}
    evidence = dict(comparison.evidence(layers, rank)) or None
    params = dict(comparison.params)
    if comparison.peer != NAIVE:
        params["weights"] = {adapter.name: 1 / len(adapters) for adapter in adapters}
    kept = rank if comparison.result == "cut" else None
    method = comparison.method
    request = MergeRequest(method, params, evidence, kept, seed)
    order = plan_merge(adapters, request)
    peer = comparison.peer, comparison.make(layers, rank, evidence or {})
    if comparison.result == "dense":
        return [(DENSE, Side(partial(dense_of, order, adapters))), peer], order

    def ours() -> Found:
        merged = merge_as_asked(adapters, request).adapter
        return {layer: (f.b, f.a) for layer, f in merged.modules.items()}

    return [(OURS, Side(ours)), (ALONE, Side(partial(cut_of, order, adapters))), peer], order
