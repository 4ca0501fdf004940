"""Run a method over the modules of K adapters: the serial path, and the parts Ray reuses."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from icm_ray.adapters import check_together, fingerprint_of
from icm_ray.errors import InputError, RecipeError, did_you_mean
from icm_ray.linalg import lowrank
from icm_ray.linalg.threads import kernel_threads
from icm_ray.methods import METHODS, Method
from icm_ray.methods.cut import RankRule, cut
from icm_ray.types import (
    Adapter,
    LoRAFactors,
    MergeReport,
    MergeResult,
    ModuleContext,
    ModuleReport,
    RankPolicy,
)

ReadFactors = Callable[[str, str], LoRAFactors]
"""Gives the factors of `(task, module)`; from memory, or from a file when they are needed."""

MergedModule = tuple[LoRAFactors, ModuleReport]


def merge(
    adapters: Sequence[Adapter],
    method: str,
    *,
    params: Mapping[str, Any] | None = None,
    evidence: object | None = None,
    output_rank: RankPolicy = None,
    seed: int = 0,
) -> MergeResult:
    """Merge K adapters of one base model into one.

    Args:
        adapters: At least one; names differ, shapes of shared modules agree, ranks may differ.
        method: A name in `METHODS`.
        params: The method's parameters by name; see `icm-ray methods --json`.
        evidence: What methods that need data were given; None for data-free methods.
        output_rank: An int, "exact", "energy:0.99", "serving:64", or None for the method's own
            default (exact for every linear method, the largest input rank for `svd`).
        seed: Keys every random draw, together with task and module.

    Returns:
        The merged adapter (float32 factors; its `dtype` says how it will be stored), the per-task
        adapters of methods that make them, and the report.

    Raises:
        RecipeError: unknown method, parameter or rank policy.
        InputError: the adapters do not fit together.
    """
    order = plan_merge(adapters, method, params, evidence, output_rank, seed)
    by_name = {adapter.name: adapter for adapter in adapters}
    merged = merge_modules(order, order.present, lambda task, m: by_name[task].modules[m])
    return assemble(order, merged, adapters)


@dataclass(frozen=True)
class MergeOrder:
    """A checked merge, small enough to send to every worker.

    Attributes:
        method: Row name.
        params: Every parameter bound.
        rule: The parsed rank policy.
        output_rank: The rank policy as given.
        present: For each module, sorted, the tasks that have it, sorted.
        tasks: All task names, sorted.
        seed: Seed of the merge.
    """

    method: str
    params: Mapping[str, Any]
    rule: RankRule
    output_rank: RankPolicy
    present: Mapping[str, tuple[str, ...]]
    tasks: tuple[str, ...]
    seed: int


def find_method(name: str) -> Method:
    """Return the METHODS row called `name`; RecipeError with the nearest name otherwise."""
    if name not in METHODS:
        raise RecipeError(
            f"method: {name!r} is not known but one of {', '.join(METHODS)} is expected."
            f"{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


def plan_merge(
    adapters: Sequence[Any],
    method: str,
    params: Mapping[str, Any] | None,
    evidence: object | None,
    output_rank: RankPolicy,
    seed: int,
) -> MergeOrder:
    """Check everything a merge needs before any arithmetic; `adapters` may be open files."""
    row = find_method(method)
    if not adapters:
        raise InputError("adapters: none given but at least one is expected.")
    if evidence is not None and row.needs is None:
        raise RecipeError(f"evidence: given but method {method!r} uses none. Leave it out.")
    bound = row.bind(params, [adapter.name for adapter in adapters])
    check_together(adapters, values=False)  # its warnings about values are `plan`'s to show
    largest = max(adapter.max_rank for adapter in adapters)
    rule = RankRule.parse(output_rank, row.default_rank, largest)
    tasks = tuple(sorted(adapter.name for adapter in adapters))
    by_name = {adapter.name: adapter for adapter in adapters}
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    present = {m: tuple(t for t in tasks if m in by_name[t].modules) for m in modules}
    return MergeOrder(method, bound, rule, output_rank, present, tasks, seed)


def merge_modules(
    order: MergeOrder, modules: Sequence[str] | Mapping[str, Any], read: ReadFactors
) -> dict[str, MergedModule]:
    """Merge some modules of an order; any split over workers gives the same bytes."""
    with kernel_threads(1), torch.no_grad():
        return {module: _merge_module(order, module, read) for module in modules}


def _merge_module(order: MergeOrder, module: str, read: ReadFactors) -> MergedModule:
    tasks = order.present[module]
    factors = [read(task, module) for task in tasks]
    context = ModuleContext(module, tasks, order.tasks, order.seed)
    norms = {t: lowrank.norm(f.b, f.a) for t, f in zip(tasks, factors, strict=True)}
    result = METHODS[order.method].function(factors, context=context, **order.params)
    del factors  # hundreds of adapters weigh more than the cut needs
    done = cut(result, order.rule)
    report = ModuleReport(
        rank=done.factors.rank,
        exact_rank=done.exact_rank,
        input_norms=norms,
        output_norm=lowrank.norm(done.factors.b, done.factors.a),
        retained_energy=done.retained_energy,
        truncation_error=max(1.0 - done.retained_energy, 0.0) ** 0.5,
        absent=tuple(task for task in order.tasks if task not in tasks),
    )
    _refuse_not_finite(order, module, report.output_norm)
    return done.factors, report


def _refuse_not_finite(order: MergeOrder, module: str, norm: float) -> None:
    # The norm of a product is not finite as soon as one entry of either factor is not.
    if not math.isfinite(norm):
        raise InputError(
            f"module {module}: method {order.method!r} gave a number that is not finite. "
            "Check the adapters' largest values and the method's parameters."
        )


def assemble(
    order: MergeOrder, merged: Mapping[str, MergedModule], adapters: Sequence[Any]
) -> MergeResult:
    """Put merged modules together; `adapters` (loaded or open) give names, dtype and config."""
    inputs = sorted(adapters, key=lambda adapter: adapter.name)
    dtypes = {adapter.dtype for adapter in inputs}
    modules = {module: merged[module][0] for module in order.present}
    layouts = {m: kind for adapter in inputs for m, kind in adapter.layouts.items()}
    name = f"{order.method}-of-{len(inputs)}"
    adapter = Adapter(
        name=name,
        base_model=next((a.base_model for a in inputs if a.base_model), None),
        modules=modules,
        config=merged_config([a.config for a in inputs]),
        fingerprint=fingerprint_of(modules),
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        layouts=layouts,
    )
    report = MergeReport(
        method=order.method,
        formula=METHODS[order.method].formula,
        params=order.params,
        seed=order.seed,
        output_rank=order.output_rank,
        inputs={a.name: _fingerprint(a) for a in inputs},
        modules={module: merged[module][1] for module in order.present},
    )
    return MergeResult(adapter, {}, report)


def merged_config(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the PEFT settings the result inherits: what every input agrees on."""
    kept = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "target_modules")
    # PEFT keeps lists of names as sets, so their order says nothing.
    plain = [
        {k: sorted(v) if isinstance(v, list) else v for k, v in c.items() if k in kept}
        for c in configs
    ]
    first = plain[0]
    return {k: first[k] for k in kept if k in first and all(c.get(k) == first[k] for c in plain)}


def _fingerprint(adapter: Any) -> str:
    value = adapter.fingerprint
    return str(value() if callable(value) else value)
