"""Where a search begins: defaults, uniform weights, earlier searches, learned merges."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from icm_ray.adapters.blocks import runs_of
from icm_ray.config import MergeRecipe
from icm_ray.errors import InputError, RecipeError
from icm_ray.evidence.learned import load_learned
from icm_ray.evidence.tensors import DESCRIPTION
from icm_ray.learning.recipes import LEARNERS
from icm_ray.methods import METHODS
from icm_ray.search.distributions import Value
from icm_ray.search.recipes import BEST
from icm_ray.search.spaces import Point, Space
from icm_ray.search.study import Start


def starts_of(
    entries: Sequence[str | Mapping[str, Any]],
    space: Space,
    modules: Sequence[str],
    place: Callable[[str], str] = str,
) -> list[Start]:
    """Return the start points; names a point leaves open are the sampler's to choose.

    Args:
        entries: As in the recipe's `start`.
        space: What is searched; ready-made points keep only what it holds.
        modules: Every module of any adapter.
        place: Says where a folder is that an entry names.

    Raises:
        RecipeError: a point names what is not searched, or a value out of range.
    """
    starts: list[Start] = []
    for entry in entries:
        if isinstance(entry, Mapping):
            starts.append(("recipe", _written(entry, space)))
            continue
        if entry == "default":
            point = _defaults(space)
        elif entry == "uniform":
            point = _equal(space, 1 / len(space.tasks))
        else:
            point = _from_folder(Path(place(entry)), space, modules)
        kept = {n: v for n, v in point.items() if space.dimensions[n].holds(v)}
        if kept:
            starts.append((entry, kept))
    return starts


def _written(entry: Mapping[str, Any], space: Space) -> dict[str, Value]:
    point: dict[str, Value] = {}
    problems = []
    for pattern, value in entry.items():
        names = [name for name in space.dimensions if fnmatchcase(name, pattern)]
        if not names:
            problems.append(
                f"start: {pattern}: not searched. Searched: {', '.join(space.dimensions)}."
            )
        for name in names:
            whole = isinstance(value, int) and not isinstance(value, bool)
            kind = space.dimensions[name].kind
            point[name] = float(value) if whole and kind == "float" else value
            if not space.dimensions[name].holds(value):
                problems.append(f"start: {name}: {value!r} is outside of what is searched.")
    if problems:
        raise RecipeError(problems)
    return point


def _defaults(space: Space) -> dict[str, Value]:
    """Return what the first method does when nobody says anything."""
    method = space.methods[0]
    takes = METHODS[method].accepted()
    learner = LEARNERS[method].model_dump() if method in LEARNERS else {}
    point: dict[str, Value] = {"method": method} if "method" in space.dimensions else {}
    for name in space.of(method):
        part, _, rest = name.removeprefix(f"{method}.").partition(".")
        if part == "params":
            point[name] = space.row.params.get(rest, takes[rest].default)
        elif part == "learn":
            section, _, key = rest.partition(".")
            point[name] = space.row.learn.get(section, {}).get(
                key, learner.get(section, {}).get(key)
            )
    return point


def _equal(space: Space, weight: float) -> dict[str, Value]:
    """Return the same coefficient for every task, in every group."""
    point: dict[str, Value] = {}
    method = space.methods[0]
    names = {name: name.removeprefix(f"{method}.").partition(".") for name in space.of(method)}
    parts = {part for part, _, _ in names.values()}
    for name, (part, _, rest) in names.items():
        if part == "weights" or (part == "layers" and "." in rest):
            point[name] = weight
        elif part == "layers":
            point[name] = 1.0 if "weights" in parts else weight
    return point


def _from_folder(folder: Path, space: Space, modules: Sequence[str]) -> dict[str, Value]:
    """Return the best of an earlier search, or the mean of learned coefficients by group."""
    if (folder / BEST).is_file():
        return _from_best(folder / BEST, space)
    if not (folder / DESCRIPTION).is_file():
        raise InputError(
            f"start: {folder}: neither {BEST} of an earlier search nor learned coefficients in it. "
            "Run that search or jobs.learn first."
        )
    learned, group = load_learned(folder), runs_of(modules, space.groups)
    sums: dict[str, list[float]] = {}
    for module in modules:
        rows = learned.tensors.get(f"{module}.coefficients")
        if rows is None:
            raise InputError(f"start: {folder}: holds no coefficients. Name a folder that does.")
        for task, row in zip(learned.tasks, rows.mean(1).tolist(), strict=True):
            for name in (f"layers.g{group[module]}.{task}", f"weights.{task}"):
                sums.setdefault(name, []).append(row)
    return {n: sum(v) / len(v) for n, v in sums.items() if n in space.dimensions}


def _from_best(path: Path, space: Space) -> dict[str, Value]:
    best = MergeRecipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    values: dict[str, Any] = {f"params.{k}": v for k, v in best.params.items()}
    for task, weight in (best.params.get("weights") or {}).items():
        by_group = weight if isinstance(weight, list) else [weight] * space.groups
        values |= {f"layers.g{i}.{task}": v for i, v in enumerate(by_group)}
        values |= {} if isinstance(weight, list) else {f"weights.{task}": weight}
    values |= {f"learn.{s}.{k}": v for s, part in best.learn.items() for k, v in part.items()}
    values |= {"method": best.method, "rank": best.output.rank}
    point: Point = _equal(space, float(best.params["scale"])) if "scale" in best.params else {}
    names = {name: name.removeprefix(f"{best.method}.") for name in space.dimensions}
    return {**point, **{n: values[bare] for n, bare in names.items() if bare in values}}
