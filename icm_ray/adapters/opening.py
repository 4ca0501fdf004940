"""Opening the adapters of a merge together: every problem at once, equal modules by one name."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from icm_ray.adapters.alignment import compare_shapes, shapes_of
from icm_ray.adapters.base_fit import misfits, refuse_misfits
from icm_ray.adapters.base_folder import BaseFolder
from icm_ray.adapters.base_names import chosen_name
from icm_ray.adapters.fused import refuse_experts
from icm_ray.adapters.peft_format import AdapterFile, open_adapter
from icm_ray.adapters.renaming import FAMILIES, changed_names, renamings
from icm_ray.errors import InputError, by_cause
from icm_ray.kinds import SavedModulesPolicy
from icm_ray.types import Adapter


def open_all(
    refs: Sequence[tuple[str, str | os.PathLike[str]]],
    saved_modules: SavedModulesPolicy = "refuse",
    *,
    base: str | None = None,
    same_base: bool = False,
    run_by: str = "",
    hashed: bool = True,
) -> list[AdapterFile]:
    """Open adapters and look at all their values, reporting the problems of all of them at once.

    Modules that transformers reads as equal get one name; what changes is among a file's warnings.

    Args:
        refs: `(name, folder)` of each adapter.
        saved_modules: What to do with full layers that PEFT's `modules_to_save` trained.
        base: The base as the user names it; whatever the adapters call theirs is taken for it.
        same_base: The user knows that the bases are one under several names.
        run_by: What will run the base with them, module by module, if anything will. It merges
            no heads, so full layers may be heads.
        hashed: Whether fingerprints will be asked for: they are then made in the same look.

    Raises:
        InputError: with every problem of every adapter.
    """
    files: list[AdapterFile] = []
    problems: list[tuple[str, str]] = []
    for name, path in refs:
        try:
            files.append(open_adapter(path, name, saved_modules=saved_modules, heads=bool(run_by)))
        except InputError as error:
            problems += [_apart(line, os.path.expanduser(path)) for line in error.problems]
    files = _of_one_base(files, base) if base or same_base else files
    files = [file for file in with_common_names(files) if isinstance(file, AdapterFile)]
    clashes: list[str] = []
    compare_shapes({file.name: shapes_of(file) for file in files}, clashes)
    if clashes and not problems:
        return files  # no value is read of them; `check_together` tells it with all that differs
    for file in files if not clashes else ():
        try:
            # Finds NaN and infinity; the result is kept for later.
            _ = file.fingerprint if hashed else file.norm
        except InputError as error:
            problems += [_apart(line, file.path) for line in error.problems]
    if problems:
        raise InputError([*by_cause(problems, joined_by=""), *clashes])
    if run_by:
        refuse_experts(files, run_by)
    return files


def _apart(line: str, path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return a problem's folder, as given or in full, and the rest, which others may share."""
    places = (os.path.abspath(path), os.fspath(path))
    place = next((place for place in places if line.startswith(place)), "")
    return place, line.removeprefix(place)


def _of_one_base(files: Sequence[AdapterFile], base: str | None) -> list[AdapterFile]:
    """Return files that call their base alike, since the user says that it is one."""
    names = [file.base_model for file in files]
    if len(set(names)) <= 1:
        return list(files)
    name = chosen_name([base, *names])
    note = f"base_model_name_or_path: taken for {name!r}, as the recipe says."
    return [
        file
        if file.base_model == name
        else file.changed(base_model=name, notes=(*file.notes, f"{file.path}: {note}"))
        for file in files
    ]


def with_common_names(adapters: Sequence[Adapter | AdapterFile]) -> list[Adapter | AdapterFile]:
    """Return adapters with the module names of another release of transformers brought up to date.

    Nothing changes unless adapters then share modules that they did not share before. A file that
    is renamed says so among its warnings, a loaded adapter through Python's `warnings`.
    """
    new = renamings({adapter.name: _paths(adapter) for adapter in adapters})
    return [_renamed(adapter, new.get(adapter.name, {})) for adapter in adapters]


def fit_base(files: Sequence[AdapterFile], base: BaseFolder) -> list[AdapterFile]:
    """Return files whose modules the base has, under the names of the installed transformers.

    Args:
        files: Opened adapters.
        base: The checked base.

    Raises:
        InputError: the config makes no model, or naming the modules that do not fit.
    """
    fitted = [_fit(file, base) for file in files]
    refuse_misfits(fitted, base)
    return fitted


def _fit(file: AdapterFile, base: BaseFolder) -> AdapterFile:
    if not misfits(file, base):
        return file
    changes = (changed_names(_paths(file), family) for family in FAMILIES)
    candidates = (_renamed(file, names) for names in changes if names)
    fitting = (one for one in candidates if isinstance(one, AdapterFile) and not misfits(one, base))
    return next(fitting, file)


def _paths(adapter: Adapter | AdapterFile) -> list[str]:
    saved = adapter.saved_names if isinstance(adapter, AdapterFile) else adapter.saved_modules
    return [*adapter.modules, *saved]


def _renamed(adapter: Adapter | AdapterFile, names: Mapping[str, str]) -> Adapter | AdapterFile:
    if not names:
        return adapter
    old = min(names)
    note = (
        f"module names of another release of transformers, such as {old}, are read as "
        f"{names[old]}, as transformers reads weights of that release."
    )
    if isinstance(adapter, AdapterFile):
        return adapter.renamed(names).changed(notes=(*adapter.notes, f"{adapter.file}: {note}"))
    warnings.warn(f"{adapter.name}: {note}", stacklevel=4)
    tables = {
        table: {names.get(path, path): value for path, value in getattr(adapter, table).items()}
        for table in ("modules", "layouts", "saved_modules")
    }
    return replace(adapter, **tables)
