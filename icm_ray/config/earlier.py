"""What an earlier merge with its adapters kept was asked for, as the start of another recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icm_ray.config.parts import with_names
from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.files import FACTORS, read_json

ORDER = "order.json"
"""In the folder of what a merge keeps: what it was asked for, without its places."""
ADAPTERS, EVIDENCE = "adapters", "evidence"
"""In the same folder: the adapters by name, and their Gram statistics."""


def with_earlier(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merge recipe's plain values with what its `earlier` and `remove` stand for.

    `adapters` are added to the earlier merge's; every other key that is given replaces its own.

    Raises:
        RecipeError: the earlier merge has kept no adapters, or what is removed is none of them.
        InputError: its files are broken.
    """
    values = dict(values)
    merged, removed = values.pop("earlier"), values.pop("remove", [])
    if not isinstance(merged, str) or not isinstance(removed, list):
        raise RecipeError("earlier, remove: a folder and a list of names are expected.")
    folder = Path(merged) / FACTORS
    if not (folder / ORDER).is_file():
        raise RecipeError(
            f"earlier: {merged} has kept no adapters but they are merged again. Merge them once "
            "more, with keep_factors: true."
        )
    order = read_json(folder / ORDER)
    kept = order.pop(ADAPTERS)
    problems = [
        f"remove: {name!r} but one of {', '.join(kept)} is expected.{did_you_mean(str(name), kept)}"
        for name in removed
        if name not in kept
    ]
    if problems:
        raise RecipeError(problems)
    refs = [
        {"name": name, "path": str(folder / ADAPTERS / name)}
        for name in kept
        if name not in removed
    ]
    order["params"] = {key: _without(value, removed) for key, value in order["params"].items()}
    if values.get("method", order["method"]) != order["method"]:
        order["params"] = {}
    elif (folder / EVIDENCE).is_dir():
        order["evidence"] = str(folder / EVIDENCE)
    output = values.get("output")
    output = {"path": output} if isinstance(output, str) else output
    if isinstance(output, Mapping):
        values["output"] = {**order.pop("output"), **output}
    return {**order, **values, "adapters": [*refs, *with_names(values.get("adapters", []))]}


def _without(value: Any, removed: list[str]) -> Any:
    """Return a parameter's value; one by task loses the tasks that are removed."""
    if not isinstance(value, dict):
        return value
    return {key: one for key, one in value.items() if key not in removed}
