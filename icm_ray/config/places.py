"""Where outputs of other jobs are, which a recipe reads: under the storage root, as they went."""

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

STORAGE_VARIABLE = "ICM_RAY_STORAGE"
EARLIER_OUTPUT = "earlier output"
"""Marks a field, `Annotated[str, EARLIER_OUTPUT]`, that may name what another job wrote."""

P = TypeVar("P", bound=BaseModel)


def root_of(storage: str | None) -> str | None:
    """Return the root of relative outputs: the recipe's, else the environment's, else None."""
    return storage or os.environ.get(STORAGE_VARIABLE)


def earlier_output(storage: str | None, path: str) -> str:
    """Return where an earlier output is: under the storage root, if it is there, or as said."""
    root = root_of(storage)
    if not root or "://" in root:
        return path
    below = Path(root, path)
    return str(below) if below.exists() else path


def with_places(recipe: P, storage: str | None) -> P:
    """Return a recipe whose marked fields, in all its parts, name where the outputs are.

    Fields that nobody set stay unset: jobs tell them from such as were.
    """
    if not root_of(storage):
        return recipe
    changes: dict[str, Any] = {}
    for name in recipe.model_fields_set:
        value = getattr(recipe, name)
        if isinstance(value, str) and EARLIER_OUTPUT in type(recipe).model_fields[name].metadata:
            changes[name] = earlier_output(storage, value)
        elif isinstance(value, BaseModel):
            changes[name] = with_places(value, storage)
        elif isinstance(value, list):
            changes[name] = [
                with_places(one, storage) if isinstance(one, BaseModel) else one for one in value
            ]
    return recipe.model_copy(update=changes)
