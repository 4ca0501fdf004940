"""Learned merging: one function over what was learned, whatever was minimised."""

from collections.abc import Sequence

from icm_ray.errors import InputError, RecipeError
from icm_ray.evidence.rebuild import rebuild
from icm_ray.methods.shared.parameters import Scale
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence


def learned(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    scale: Scale = 1.0,
) -> LoRAFactors:
    """Merge as it was learned: `scale * (sum_k c_k delta_k)`, a core between bases, or a LoRA.

    Evidence: `coefficients` `(tasks, blocks)` multiply the terms' ranks, or `core` `(p, q)` stands
    between the polar factors of the stacked terms, or `a` and `b` are in place of them. Terms are
    the deltas unless `a.<task>` and `b.<task>` replace them; `residual_a` and `residual_b` are
    added as they are. The result is an exact LoRA of the summed rank, plus the residual's.

    Raises:
        RecipeError: there is no evidence for this module.
        InputError: the coefficients are those of another number of tasks.
    """
    if not evidence or not {"coefficients", "core", "a"} & set(evidence):
        raise RecipeError(
            f"evidence: {context.module}: no coefficients, core or factors. Learn them "
            "with jobs.learn."
        )
    tensors = {name: tensor.float() for name, tensor in evidence.items()}
    shape = (
        tensors["coefficients"].shape if "coefficients" in tensors else (len(context.all_tasks), 1)
    )
    if len(shape) != 2 or shape[0] != len(context.all_tasks) or shape[1] < 1:
        raise InputError(
            f"evidence: {context.module}.coefficients: {tuple(shape)} but one row for each of the "
            f"{len(context.all_tasks)} adapters is expected. Learn them again."
        )
    present = dict(zip(context.tasks, factors, strict=True))
    try:
        merged = rebuild(present, context.all_tasks, tensors)
    except (KeyError, RuntimeError, IndexError) as error:
        raise InputError(
            f"evidence: {context.module}: tensors that do not fit together or the adapters "
            f"({error}). Learn them again."
        ) from None
    return LoRAFactors(merged.a, merged.b * scale)
