"""The Gram statistics of one module, checked."""

from icm_ray.errors import InputError
from icm_ray.linalg.gram import GRAM_KINDS, Gram
from icm_ray.types import ModuleContext, ModuleEvidence


def grams_of(d_in: int, context: ModuleContext, evidence: ModuleEvidence) -> dict[str, Gram]:
    """Return the Grams of a module by task, in the order of the tasks; none if it has none.

    Raises:
        InputError: Grams for some tasks of the module only, or of another size.
    """
    found = {task: _gram(d_in, context.module, task, evidence) for task in context.all_tasks}
    grams = {task: gram for task, gram in found.items() if gram is not None}
    missing = [task for task in context.tasks if task not in grams]
    if grams and missing:
        raise InputError(
            f"{context.module}.gram: none for {', '.join(missing)} but for {', '.join(grams)}. "
            "Gather inputs of every task that has the module, or leave the module's Grams out."
        )
    return grams


def _gram(d_in: int, module: str, task: str, evidence: ModuleEvidence) -> Gram | None:
    stored = {k: evidence[f"{k}.{task}"] for k in GRAM_KINDS if f"{k}.{task}" in evidence}
    for kind, tensor in stored.items():
        shape, rows = tuple(tensor.shape), tensor.shape[:1]
        wanted = {"gram": (d_in, d_in), "gram_root": (*rows, d_in), "gram_diagonal": (d_in,)}[kind]
        is_upper = kind == "gram" and shape == (d_in * (d_in + 1) // 2,)
        if shape != wanted and not is_upper:
            raise InputError(
                f"{module}.{kind}.{task}: {shape} but {wanted} is expected. Gather it from the "
                "inputs of this module."
            )
    return Gram.of(d_in, **stored) if stored else None
