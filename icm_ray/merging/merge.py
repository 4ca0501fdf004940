"""Run a method over the modules of K adapters: the serial path, and the parts Ray reuses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from icm_ray.adapters import AdapterFile, fingerprint_of, with_common_names
from icm_ray.adapters.base_names import chosen_name
from icm_ray.devices import find_device, made_on, to_cpu
from icm_ray.kinds import CutMetric
from icm_ray.linalg import lowrank
from icm_ray.linalg.threads import kernel_threads
from icm_ray.merging.budget import within
from icm_ray.merging.cut import Cut, cut, is_within
from icm_ray.merging.inputs import (
    ReadFactors,
    finite_only,
    inputs_of,
    not_finite,
    seen_by_inputs,
)
from icm_ray.merging.module import MergedModule
from icm_ray.merging.order import MergeOrder, MergeRequest, plan_merge
from icm_ray.merging.passes import with_statistics
from icm_ray.merging.seen import cut_as_seen, with_seen
from icm_ray.methods import METHODS
from icm_ray.types import (
    Adapter,
    Delta,
    LoRAFactors,
    MergeReport,
    MergeResult,
    ModuleReport,
    PerTask,
    RankPolicy,
)


def merge(
    adapters: Sequence[Adapter | AdapterFile],
    method: str,
    *,
    params: Mapping[str, Any] | None = None,
    evidence: object | None = None,
    output_rank: RankPolicy = None,
    output_metric: CutMetric | None = None,
    seed: int = 0,
) -> MergeResult:
    """Merge K adapters of one base model into one.

    Args:
        adapters: At least one; names differ, shapes of shared modules agree, ranks may differ. Open
            files are read one module and task at a time.
        method: A name in `METHODS`.
        params: The method's parameters by name; see `icm-ray methods --json`.
        evidence: What the method is told of models and data: a path, or tensors by name as
            docs/evidence.md lays them out; None for data-free methods.
        output_rank: An int, "exact", "energy:0.99", "serving:64", "total:400" (over all modules),
            or None for the method's own default: exact for every linear and learned method, the
            largest input rank for `svd` and for dense results.
        output_metric: What a cut to that rank keeps most of: what the "inputs" see whose Gram
            statistics are among the evidence, or entries of the "weights"; None: the first where
            there are any.
        seed: Keys every random draw, together with task and module.

    Returns:
        The merged adapter (float32 factors; its `dtype` says how it will be stored), the per-task
        adapters of methods that make them, and the report.

    Raises:
        RecipeError: unknown method, parameter or rank policy.
        InputError: the adapters do not fit together.
    """
    request = MergeRequest(method, params, evidence, output_rank, seed, output_metric=output_metric)
    return merge_as_asked(adapters, request)


def merge_as_asked(adapters: Sequence[Adapter | AdapterFile], request: MergeRequest) -> MergeResult:
    """Merge in this process; see `merge`."""
    adapters, order, read = opened(adapters, request)
    order = with_statistics(order, read)
    return assemble(order, merge_modules(order, order.present, read), adapters)


def opened(
    adapters: Sequence[Adapter | AdapterFile], request: MergeRequest
) -> tuple[Sequence[Adapter | AdapterFile], MergeOrder, ReadFactors]:
    """Return adapters under common names, their checked merge, and what reads their factors."""
    adapters = with_common_names(adapters)
    order = plan_merge(adapters, request)
    by_name = {adapter.name: adapter for adapter in adapters}

    def read(task: str, module: str) -> LoRAFactors:
        one = by_name[task]
        return one.factors(module) if isinstance(one, AdapterFile) else one.modules[module]

    return adapters, order, read


def merge_modules(
    order: MergeOrder, modules: Sequence[str] | Mapping[str, Any], read: ReadFactors
) -> dict[str, MergedModule]:
    """Merge some modules of an order; any split over workers gives the same bytes."""
    with kernel_threads(1), torch.no_grad(), made_on(find_device(order.device)):
        merged = {}
        for module in modules:
            with finite_only(order.method, module):
                merged[module] = _merge_module(order, module, read)
        return merged


def _merge_module(order: MergeOrder, module: str, read: ReadFactors) -> MergedModule:
    factors, context, extra = inputs_of(order, module, read, with_norms=True)
    try:
        params = order.params_at(module)
        result = METHODS[order.method].function(factors, context=context, **extra, **params)
    finally:
        factors.refuse_not_finite()  # says more than whatever NaN did inside of the method
    of_tasks = result.tasks if isinstance(result, PerTask) else {}
    done = _cut(order, module, result.unified if isinstance(result, PerTask) else result)
    of_tasks = {task: cut(one, order.rule) for task, one in of_tasks.items()}
    for task in set(context.tasks) - set(factors.norms):  # a weight of zero: never asked for
        _ = factors[context.tasks.index(task)]
    done = _after(order, module, done, factors.norms)
    report = ModuleReport(
        rank=done.factors.rank,
        exact_rank=done.exact_rank,
        input_norms={task: factors.norms[task] for task in context.tasks},
        output_norm=lowrank.norm(done.factors.b, done.factors.a),
        retained_energy=done.retained_energy,
        truncation_error=max(1.0 - done.retained_energy, 0.0) ** 0.5,
        absent=tuple(task for task in order.tasks if task not in context.tasks),
        cut=done.route,
        seen_energy=done.seen.energy if done.seen else None,
    )
    _refuse_not_finite(order, module, report.output_norm)
    tasks = {task: _home(one.factors) for task, one in of_tasks.items()}
    energies = {task: one.retained_energy for task, one in of_tasks.items()}
    values = done.seen.values if done.seen else None
    values = to_cpu(values) if values is not None else None
    return MergedModule(_home(done.factors), replace(report, task_energy=energies), tasks, values)


def _cut(order: MergeOrder, module: str, result: LoRAFactors | Delta) -> Cut:
    """Cut a module's common change; what belongs to one task alone is cut by its weights."""
    if order.rule.kind == "exact" or is_within(result, order.rule):
        return cut(result, order.rule)
    inputs = seen_by_inputs(order, module, result.shape[1])
    if inputs is not None and order.output_metric == "inputs":
        return cut_as_seen(result, order.rule, inputs)
    done = cut(result, order.rule)
    return done if inputs is None else with_seen(done, result, inputs)


def _after(order: MergeOrder, module: str, done: Cut, norms: Mapping[str, float]) -> Cut:
    """Return a module with what its steps multiply it by."""
    if not order.steps.asked:
        return done
    silent = order.silent_at(module)
    heard = [norm for task, norm in norms.items() if task not in silent]
    norm = lowrank.norm(done.factors.b, done.factors.a)
    factor = order.steps.factor(norm, heard, order.depths.get(module))
    return replace(done, factors=replace(done.factors, b=done.factors.b * factor))


def _home(factors: LoRAFactors) -> LoRAFactors:
    return LoRAFactors(to_cpu(factors.a), to_cpu(factors.b), factors.scaling)


def _refuse_not_finite(order: MergeOrder, module: str, norm: float) -> None:
    # The norm of a product is not finite as soon as one entry of either factor is not.
    if not math.isfinite(norm):
        raise not_finite(order.method, module)


def assemble(
    order: MergeOrder, merged: Mapping[str, MergedModule], adapters: Sequence[Any]
) -> MergeResult:
    """Put merged modules together; `adapters` (loaded or open) give names, dtype and config."""
    inputs = sorted(adapters, key=lambda adapter: adapter.name)
    if order.rule.kind == "total":
        merged = within(merged, int(order.rule.number), order.steps)
    report = MergeReport(
        method=order.method,
        formula=METHODS[order.method].formula,
        params={**order.params, **order.steps.asked},
        seed=order.seed,
        output_rank=order.output_rank,
        output_metric=order.output_metric,
        inputs={a.name: a.fingerprint for a in inputs},
        modules={module: merged[module].report for module in order.present},
        evidence=order.evidence.identity if order.evidence else None,
        per_task=_kept_of_tasks(merged),
    )
    together = {module: merged[module].factors for module in order.present}
    adapter = _adapter(f"{order.method}-of-{len(inputs)}", together, inputs)
    per_task = {
        task: _adapter(
            task, {m: one.tasks[task] for m, one in merged.items() if task in one.tasks}, inputs
        )
        for task in report.per_task
    }
    return MergeResult(adapter, per_task, report)


def _adapter(name: str, modules: Mapping[str, LoRAFactors], inputs: Sequence[Any]) -> Adapter:
    dtypes = {adapter.dtype for adapter in inputs}
    layouts = {m: kind for adapter in inputs for m, kind in adapter.layouts.items()}
    return Adapter(
        name=name,
        base_model=chosen_name(a.base_model for a in inputs),
        modules=modules,
        config=merged_config([a.config for a in inputs]),
        fingerprint=fingerprint_of(modules),
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        layouts={m: kind for m, kind in layouts.items() if m in modules},
    )


def _kept_of_tasks(merged: Mapping[str, MergedModule]) -> dict[str, float]:
    """Return the share of each task's own change that the cut kept, over all its modules."""
    kept: dict[str, float] = {}
    before: dict[str, float] = {}
    for _, one in sorted(merged.items()):
        for task, factors in sorted(one.tasks.items()):
            square = lowrank.norm(factors.b, factors.a) ** 2
            share = one.report.task_energy[task]
            kept[task] = kept.get(task, 0.0) + square
            before[task] = before.get(task, 0.0) + (square / share if share else 0.0)
    return {task: kept[task] / before[task] if before[task] else 1.0 for task in sorted(kept)}


def merged_config(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the PEFT settings the result inherits: what every input agrees on."""
    kept = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "fan_in_fan_out")
    kept += ("target_modules",)
    # PEFT keeps lists of names as sets, so their order says nothing.
    plain = [
        {k: sorted(v) if isinstance(v, list) else v for k, v in c.items() if k in kept}
        for c in configs
    ]
    first = plain[0]
    return {k: first[k] for k in kept if k in first and all(c.get(k) == first[k] for c in plain)}
