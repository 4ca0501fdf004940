"""Do these adapters belong together? Asked once for all of them, before any work starts."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from icm_ray.adapters.base_names import bare_name
from icm_ray.adapters.fingerprint import squared_norm
from icm_ray.adapters.peft_format import AdapterFile
from icm_ray.errors import InputError
from icm_ray.types import Adapter

MAX_NAME_BYTES = 120
_NAME_PUNCTUATION = " _.,+=@()[]-"
NEAR = 1 + 1e-6
"""How far norms in float32 may be apart of what is equal."""


def check_together(adapters: Sequence[Adapter | AdapterFile], *, values: bool = True) -> list[str]:
    """Check that adapters can be merged with each other, and return what looks unintended.

    Args:
        adapters: Loaded adapters or open files.
        values: Warn about equal and very unequal adapters too, which reads all their values.

    Raises:
        InputError: with every problem: no adapters, unusable or clashing names, different bases,
            modules of different shape or layout, adapters that share no module with the others.
    """
    problems = [] if adapters else ["adapters: none but at least one is expected. Name some."]
    problems += name_problems([adapter.name for adapter in adapters])
    warnings: list[str] = []
    _compare_bases(adapters, problems, warnings)
    shapes = {adapter.name: shapes_of(adapter) for adapter in adapters}
    compare_shapes(shapes, problems)
    problems += _unconnected(shapes)
    if problems:
        raise InputError(problems)
    _compare_modules(shapes, warnings)
    _compare_tasks(adapters, warnings)
    if values:
        _compare_values(adapters, warnings)
    return warnings


def name_problems(names: Iterable[str]) -> list[str]:
    """Say which task names cannot be folder names, or would share a folder on some disk."""
    problems = []
    taken: dict[str, str] = {}
    for name in names:
        if not _is_safe(name):
            problems.append(
                f"{name!r}: no usable task name but letters, digits and '_', '-', '.', inside at "
                f"most {MAX_NAME_BYTES} bytes, are expected. Give the adapter another name."
            )
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if folded in taken:
            problems.append(
                f"{name!r}: the same as {taken[folded]!r} up to case and accents' spelling but "
                "each task name is expected once. Rename one."
            )
        taken.setdefault(folded, name)
    return problems


def _is_safe(name: str) -> bool:
    if not name or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        return False
    plain = all(
        char.isalnum() or char in _NAME_PUNCTUATION or unicodedata.category(char)[0] == "M"
        for char in name
    )
    return plain and (name[0].isalnum() or name[0] == "_") and name[-1] not in " ."


def _compare_bases(
    adapters: Sequence[Adapter | AdapterFile], problems: list[str], warnings: list[str]
) -> None:
    users: dict[str, list[str]] = defaultdict(list)
    spellings: dict[str, set[str]] = defaultdict(set)
    for adapter in adapters:
        base = bare_name(adapter.base_model)
        users[base].append(adapter.name)
        spellings[base].add((adapter.base_model or "").rstrip("/"))
    unknown = users.pop("", [])
    if len(users) > 1:
        named = (f"{min(spellings[base])!r} ({names[0]})" for base, names in users.items())
        problems.append(
            f"base_model_name_or_path: {', '.join(named)} but one base for all adapters is "
            "expected. If these are one model, name it as base: of the recipe, or set same_base: "
            "true there."
        )
    warnings += [
        f"base_model_name_or_path: {', '.join(map(repr, sorted(names)))} taken for one base."
        for base, names in spellings.items()
        if base and len(names) > 1
    ]
    if unknown and users:
        warnings.append(f"{_few(unknown)}: no base model named; taken for the same as the others'.")
    revisions = {
        str(adapter.config["revision"]) for adapter in adapters if adapter.config.get("revision")
    }
    if len(revisions) > 1:
        warnings.append(f"revision: the base's differ: {', '.join(sorted(revisions))}.")


def _few(names: Sequence[str]) -> str:
    """Return some names, and how many more there are."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def shapes_of(adapter: Adapter | AdapterFile) -> dict[str, tuple[int, int, str]]:
    """Return `(d_out, d_in, layout)` by module."""
    if isinstance(adapter, AdapterFile):
        sizes = {module: shape[:2] for module, shape in adapter.shapes.items()}
    else:
        sizes = {module: factors.shape for module, factors in adapter.modules.items()}
    return {module: (*size, adapter.layouts.get(module, "")) for module, size in sizes.items()}


def compare_shapes(shapes: dict[str, dict[str, tuple[int, int, str]]], problems: list[str]) -> None:
    """Add a problem for every two adapters whose modules of one name differ in shape or layout."""
    first: dict[str, str] = {}
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, modules in shapes.items():
        for module, shape in modules.items():
            other = first.setdefault(module, name)
            if shape != shapes[other][module]:
                wrong[name, other].append(module)
    for (name, other), modules in wrong.items():
        module = modules[0]
        more = f" (And {len(modules) - 1} more.)" if len(modules) > 1 else ""
        problems.append(
            f"{name}: {module}: {_words(shapes[name][module])} but "
            f"{_words(shapes[other][module])} as in {other} is expected. Merge adapters of one "
            f"base model.{more}"
        )


def _unconnected(shapes: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return one problem if adapters fall into groups without a common module."""
    groups: list[tuple[set[str], list[str]]] = []
    for name, modules in shapes.items():
        near = [group for group in groups if group[0] & modules.keys()]
        paths = set(modules).union(*(group[0] for group in near))
        names = [*(other for group in near for other in group[1]), name]
        groups = [*(group for group in groups if group not in near), (paths, names)]
    if len(groups) <= 1:
        return []
    each = "; ".join(f"{_few(names)} ({min(paths)} ...)" for paths, names in groups)
    return [
        f"modules: {each} but modules in common are expected. "
        f"{_prefix_advice(groups[0][0], groups[1][0])}"
    ]


def _prefix_advice(ours: set[str], theirs: set[str]) -> str:
    """Say whether it is a prefix alone that keeps modules apart, and what to do."""
    for short, long in ((ours, theirs), (theirs, ours)):
        name = min(short)
        prefix = next((m.removesuffix(name) for m in sorted(long) if m.endswith(f".{name}")), "")
        if prefix:
            return (
                f"Only the prefix {prefix!r} differs, as between AutoModel and a model with a "
                "head; PEFT does not read one as the other. Train all from one model class."
            )
    return "Merge adapters of the same layers of one base model."


def _words(shape: tuple[int, int, str]) -> str:
    return f"{shape[0]} x {shape[1]} {shape[2]}".rstrip()


def _compare_modules(
    shapes: dict[str, dict[str, tuple[int, int, str]]], warnings: list[str]
) -> None:
    if len(shapes) == 1:
        warnings.append(
            f"{next(iter(shapes))}: the only adapter; there is nothing to merge it with."
        )
        return
    union = set().union(*shapes.values())
    if not set.intersection(*(set(modules) for modules in shapes.values())):
        warnings.append("no module is in every adapter; absent modules count as no change.")
        return
    lacking: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name, modules in shapes.items():
        if absent := sorted(union - set(modules)):
            lacking[len(absent), absent[0]].append(name)
    warnings += [
        f"{_few(names)}: lacks {count} of {len(union)} modules, such as {module}; they count as no "
        "change."
        for (count, module), names in lacking.items()
    ]


def _compare_tasks(adapters: Sequence[Adapter | AdapterFile], warnings: list[str]) -> None:
    users: dict[str, list[str]] = defaultdict(list)
    for adapter in adapters:
        users[str(adapter.config.get("task_type") or "none")].append(adapter.name)
    if len(users) > 1:
        kinds = ", ".join(f"{kind} ({_few(names)})" for kind, names in users.items())
        warnings.append(
            f"task_type: {kinds} differ, so the merge has none. Load it onto the model class of "
            "the task at hand, as its README shows."
        )


def _compare_values(adapters: Sequence[Adapter | AdapterFile], warnings: list[str]) -> None:
    norms = {adapter.name: _norm(adapter) for adapter in adapters}
    near = _near(norms)
    seen: dict[str, str] = {}
    for adapter in adapters:
        if adapter.name in near:
            first = seen.setdefault(adapter.fingerprint, adapter.name)
            if first != adapter.name:
                warnings.append(f"{adapter.name}: the same change as {first}, twice.")
    norms = {name: norm for name, norm in norms.items() if norm}
    if norms and max(norms.values()) > 1000 * min(norms.values()):
        small, large = (
            min(norms, key=norms.__getitem__),
            max(norms, key=norms.__getitem__),
        )
        warnings.append(
            f"{large}: its change is {norms[large] / norms[small]:.0f} times that of {small}, "
            "which will hardly show in the merge."
        )


def _norm(adapter: Adapter | AdapterFile) -> float:
    if isinstance(adapter, AdapterFile):
        return adapter.norm
    return sum(map(squared_norm, adapter.modules.values())) ** 0.5


def _near(norms: Mapping[str, float]) -> set[str]:
    """Return the adapters of equal norms, up to rounding: no others can be equal."""
    pairs = pairwise(sorted(norms, key=norms.__getitem__))
    equal = [pair for pair in pairs if norms[pair[1]] <= NEAR * norms[pair[0]]]
    return {name for pair in equal for name in pair}
