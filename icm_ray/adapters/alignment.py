"""Do these adapters belong together? Asked once for all of them, before any work starts."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from icm_ray.adapters.fingerprint import squared_norm
from icm_ray.adapters.peft_format import AdapterFile, open_adapter
from icm_ray.errors import InputError
from icm_ray.types import Adapter, SavedModulesPolicy

MAX_NAME_BYTES = 120
_NAME_PUNCTUATION = " _.,+=@()[]-"


def open_all(
    refs: Sequence[tuple[str, str | os.PathLike[str]]],
    saved_modules: SavedModulesPolicy = "refuse",
) -> list[AdapterFile]:
    """Open adapters and look at all their values, reporting the problems of all of them at once.

    Args:
        refs: `(name, folder)` of each adapter.
        saved_modules: What to do with full layers that PEFT's `modules_to_save` trained.

    Raises:
        InputError: with every problem of every adapter.
    """
    files, problems = [], []
    for name, path in refs:
        try:
            files.append(open_adapter(path, name, saved_modules=saved_modules))
        except InputError as error:
            problems += error.problems
    clashes: list[str] = []
    _compare_shapes({file.name: _shapes(file) for file in files}, clashes)
    if problems and clashes:
        raise InputError(problems + clashes)
    if clashes:  # no value is read of them; `check_together` tells it with all else that differs
        return files
    for file in files:
        try:
            file.fingerprint()  # finds NaN and infinity; the result is kept for later
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return files


def check_together(adapters: Sequence[Adapter | AdapterFile], *, values: bool = True) -> list[str]:
    """Check that adapters can be merged with each other, and return what looks unintended.

    Args:
        adapters: Loaded adapters or open files.
        values: Warn about equal and very unequal adapters too, which reads all their values.

    Raises:
        InputError: with every problem: no adapters, unusable or clashing names, different bases,
            modules of different shape or layout.
    """
    problems = [] if adapters else ["adapters: none but at least one is expected. Name some."]
    problems += name_problems([adapter.name for adapter in adapters])
    warnings: list[str] = []
    _compare_bases(adapters, problems, warnings)
    shapes = {adapter.name: _shapes(adapter) for adapter in adapters}
    _compare_shapes(shapes, problems)
    if problems:
        raise InputError(problems)
    _compare_modules(shapes, warnings)
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
    for adapter in adapters:
        users[(adapter.base_model or "").rstrip("/")].append(adapter.name)
    unknown = users.pop("", [])
    if len(users) > 1:
        told = ", ".join(f"{base!r} ({names[0]})" for base, names in users.items())
        problems.append(
            f"base_model_name_or_path: {told} but one base for all adapters is expected. "
            "Merge adapters of one base; if these are one model, give it one name."
        )
    if unknown:
        warnings.append(
            f"{', '.join(unknown)}: no base model named; taken for the same as the others'."
        )
    revisions = {
        str(adapter.config["revision"]) for adapter in adapters if adapter.config.get("revision")
    }
    if len(revisions) > 1:
        warnings.append(f"revision: the base's differ: {', '.join(sorted(revisions))}.")


def _shapes(adapter: Adapter | AdapterFile) -> dict[str, tuple[int, int, str]]:
    """Return `(d_out, d_in, layout)` by module."""
    if isinstance(adapter, AdapterFile):
        sizes = {module: shape[:2] for module, shape in adapter.shapes.items()}
    else:
        sizes = {module: factors.shape for module, factors in adapter.modules.items()}
    return {module: (*size, adapter.layouts.get(module, "")) for module, size in sizes.items()}


def _compare_shapes(
    shapes: dict[str, dict[str, tuple[int, int, str]]], problems: list[str]
) -> None:
    first: dict[str, str] = {}
    for name, modules in shapes.items():
        for module, shape in modules.items():
            other = first.setdefault(module, name)
            expected = shapes[other][module]
            if shape != expected:
                problems.append(
                    f"{name}: {module}: {_words(shape)} but {_words(expected)} as in {other} is "
                    "expected. Merge adapters of one base model."
                )


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
    for name, modules in shapes.items():
        if absent := sorted(union - set(modules)):
            warnings.append(
                f"{name}: lacks {len(absent)} of {len(union)} modules, such as {absent[0]}; they "
                "count as no change."
            )


def _compare_values(adapters: Sequence[Adapter | AdapterFile], warnings: list[str]) -> None:
    seen: dict[str, str] = {}
    norms: dict[str, float] = {}
    for adapter in adapters:
        if isinstance(adapter, AdapterFile):
            fingerprint, norm = adapter.fingerprint(), adapter.norm
        else:
            fingerprint = adapter.fingerprint
            norm = sum(map(squared_norm, adapter.modules.values())) ** 0.5
        if fingerprint in seen:
            warnings.append(f"{adapter.name}: the same change as {seen[fingerprint]}, twice.")
        seen.setdefault(fingerprint, adapter.name)
        if norm:
            norms[adapter.name] = norm
    if norms and max(norms.values()) > 1000 * min(norms.values()):
        small, large = (
            min(norms, key=norms.__getitem__),
            max(norms, key=norms.__getitem__),
        )
        warnings.append(
            f"{large}: its change is {norms[large] / norms[small]:.0f} times that of {small}, "
            "which will hardly show in the merge."
        )
