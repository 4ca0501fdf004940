"""Parameter types that several methods share; their metadata is the schema users see."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from icm_ray.types import ModuleContext

Weights = Annotated[
    Mapping[str, float] | None,
    Field(
        description="One number per task: a list in the order of the adapters, or a mapping.",
        json_schema_extra={
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "number"}},
                {"type": "array", "items": {"type": "number"}},
                {"type": "null"},
            ]
        },
    ),
]
Scale = Annotated[
    float,
    Field(ge=-1e6, le=1e6, allow_inf_nan=False, description="Multiplies the merged delta."),
]


def task_weights(
    context: ModuleContext, weights: Mapping[str, float] | None, *, default: float
) -> list[float]:
    """Return the weight of each task present in this module; `default` where none are given."""
    if weights is None:
        return [default] * len(context.tasks)
    return [weights[task] for task in context.tasks]
