"""The Gram statistics of one module, checked."""

from jaxtyping import Float
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.types import ModuleContext, ModuleEvidence


def grams_of(
    d_in: int, context: ModuleContext, evidence: ModuleEvidence
) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """Return the Grams of a module by task, in the order of the tasks; none if it has none.

    Raises:
        InputError: Grams for some tasks of the module only, or of another size.
    """
    names = {task: f"gram.{task}" for task in context.all_tasks}
    grams = {task: evidence[name] for task, name in names.items() if name in evidence}
    missing = [task for task in context.tasks if task not in grams]
    if grams and missing:
        raise InputError(
            f"{context.module}.gram: none for {', '.join(missing)} but for {', '.join(grams)}. "
            "Gather inputs of every task that has the module, or leave the module's Grams out."
        )
    for task, gram in grams.items():
        if gram.shape != (d_in, d_in):
            raise InputError(
                f"{context.module}.gram.{task}: {tuple(gram.shape)} but {(d_in, d_in)} is "
                "expected. Gather it from the inputs of this module."
            )
    return grams
