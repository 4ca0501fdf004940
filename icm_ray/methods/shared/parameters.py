"""Parameter types that several methods share; their metadata is the schema users see."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from icm_ray.types import ModuleContext


def _by_task(number: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of one entry a task: a mapping, a list in the adapters' order, or none."""
    return {
        "anyOf": [
            {"type": "object", "additionalProperties": number},
            {"type": "array", "items": number},
            {"type": "null"},
        ]
    }


_NUMBER = {"type": "number"}
TaskWeights = Annotated[
    Mapping[str, float] | None,
    Field(
        description="One number per task: a list in the order of the adapters, or a mapping.",
        json_schema_extra=_by_task(_NUMBER),
    ),
]
Weights = Annotated[
    Mapping[str, float | Annotated[list[float], Field(min_length=1)]] | None,
    Field(
        description="Per task one number, or one for each of equal groups of layers, the first "
        "next to the input: a list in the order of the adapters, or a mapping.",
        json_schema_extra=_by_task({"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER}]}),
    ),
]
"""A method itself is always given one number a task: those of the module's own group."""
Scale = Annotated[
    float,
    Field(
        ge=-1e6,
        le=1e6,
        allow_inf_nan=False,
        description="Multiplies the merged delta.",
        json_schema_extra={"usual": "loguniform(0.1, 2)"},
    ),
]
"""Of sums over tasks, which want less than 1, and of averages, which want about 1."""


def usual(distribution: str) -> Any:
    """Return what a parameter's annotation says of the range that searches try by default."""
    return Field(json_schema_extra={"usual": distribution})


def task_weights(
    context: ModuleContext, weights: Mapping[str, Any] | None, *, default: float
) -> list[float]:
    """Return the weight of each task present in this module; `default` where none are given."""
    if weights is None:
        return [default] * len(context.tasks)
    return [weights[task] for task in context.tasks]
