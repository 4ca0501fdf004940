"""What an earlier merge with its adapters kept was asked for, as the start of another recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icm_ray.config.parts import laid_over, with_names
from icm_ray.errors import InputError, RecipeError, did_you_mean
from icm_ray.files import FACTORS, read_json

ORDER = "order.json"
"""In the folder of what a merge keeps: what it was asked for, without its places."""
ADAPTERS, EVIDENCE = "adapters", "evidence"
"""In the same folder: the adapters by name, and their Gram statistics."""
ASKED = ("method", "params", "seed", "base", "revision", "same_base", "modules_to_save")
OF_OUTPUT = ("rank", "metric", "dtype")
"""Keys of a recipe that an order may hold, and of its output; no other opens a door."""


def with_earlier(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merge recipe's plain values with what its `earlier` and `remove` stand for.

    `adapters` are added to the earlier merge's; every other key that is given replaces its own.

    Raises:
        RecipeError: the earlier merge has kept no adapters, or what is removed is none of them.
        InputError: its files are broken.
    """
    values = dict(values)
    merged, removed = values.pop("earlier"), values.pop("remove", None) or []
    if not isinstance(merged, str) or not isinstance(removed, list):
        raise RecipeError("earlier, remove: a folder and a list of names are expected.")
    order, folder = _order_of(Path(merged)), Path(merged) / FACTORS
    kept = order.pop(ADAPTERS)
    added = with_names(values.get("adapters") or [])
    problems = [
        f"remove: {name!r} but one of {', '.join(kept)} is expected.{did_you_mean(str(name), kept)}"
        for name in removed
        if name not in kept
    ]
    names = [one.get("name") if isinstance(one, dict) else None for one in added]
    problems += [
        f"adapters: {name!r} but {merged} has one of that name. Remove that, or give this another "
        "name in a recipe."
        for name in names
        if name in kept and name not in removed
    ]
    output = values.get("output")
    output = {"path": output} if isinstance(output, str) else output
    place = output.get("path") if isinstance(output, dict) else None
    if isinstance(place, str) and Path(merged).resolve() in Path(place).resolve().parents:
        problems.append(f"output: {place} lies in {merged}. Choose another output path.")
    if problems:
        raise RecipeError(problems)
    refs = [
        {"name": name, "path": str(folder / ADAPTERS / name)}
        for name in kept
        if name not in removed
    ]
    asked = values.get("params") or {}
    if values.get("method", order["method"]) == order["method"] and isinstance(asked, dict):
        params = {key: _without(value, removed) for key, value in order["params"].items()}
        values["params"] = laid_over(params, asked)
        if (folder / EVIDENCE).is_dir():
            order["evidence"] = str(folder / EVIDENCE)
    del order["params"]
    if isinstance(output, dict):
        values["output"] = {**order.pop("output"), **output}
    return {**order, **values, "adapters": [*refs, *added]}


def _order_of(merged: Path) -> dict[str, Any]:
    """Return what the merge in a folder was asked for."""
    if not merged.is_dir():
        raise RecipeError(f"earlier: {merged}: no such folder. Check the path.")
    file = merged / FACTORS / ORDER
    if not file.is_file():
        raise RecipeError(
            f"earlier: {merged} has kept no adapters but they are merged again. Merge them once "
            "more, with keep_factors: true."
        )
    order = read_json(file)
    expected = {ADAPTERS: list, "params": dict, "method": str, "output": dict}
    if not isinstance(order, dict) or not all(
        isinstance(order.get(key), kind) for key, kind in expected.items()
    ):
        raise InputError(f"{file}: no order of a merge. Merge once more with keep_factors: true.")
    output = {key: value for key, value in order["output"].items() if key in OF_OUTPUT}
    known = {key: value for key, value in order.items() if key in (*ASKED, ADAPTERS)}
    return {**known, "output": output}


def _without(value: Any, removed: list[str]) -> Any:
    """Return a parameter's value; one by task loses the tasks that are removed."""
    if not isinstance(value, dict):
        return value
    return {key: one for key, one in value.items() if key not in removed}
