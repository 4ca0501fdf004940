"""Learned merging: one function over what was learned, whatever was minimised."""

from collections.abc import Sequence

from icm_ray.errors import InputError, RecipeError
from icm_ray.methods.parameters import Scale
from icm_ray.methods.rebuild import rebuild
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence


def learned(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    scale: Scale = 1.0,
) -> LoRAFactors:
    """Merge as it was learned: `scale * (sum_k c_k delta_k)`, or a core between shared bases.

    Evidence: `coefficients` `(tasks, blocks)` multiply the terms' ranks, or `core` `(p, q)` stands
    between the polar factors of the stacked terms. Terms are the deltas unless `a.<task>` and
    `b.<task>` replace them; `residual_a` and `residual_b` are added as they are. The result is an
    exact LoRA of the summed rank, plus the residual's.

    Raises:
        RecipeError: there is no evidence for this module.
        InputError: the coefficients are those of another number of tasks.
    """
    if not evidence or not {"coefficients", "core"} & set(evidence):
        raise RecipeError(
            f"evidence: {context.module}: neither coefficients nor core. Learn them with "
            "jobs.learn."
        )
    rows = len(evidence["coefficients"]) if "coefficients" in evidence else len(context.all_tasks)
    if rows != len(context.all_tasks):
        raise InputError(
            f"evidence: {context.module}.coefficients: {rows} rows but one for each of the "
            f"{len(context.all_tasks)} adapters is expected. Learn them again."
        )
    present = dict(zip(context.tasks, factors, strict=True))
    merged = rebuild(present, context.all_tasks, evidence)
    return LoRAFactors(merged.a, merged.b * scale)
