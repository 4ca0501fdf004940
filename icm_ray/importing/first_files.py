"""`icm-ray init`: a suite.yaml and a recipe to start from, out of adapters and data files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import AdapterRef, folder_names
from icm_ray.errors import InputError, RecipeError, one_line
from icm_ray.importing.guesses import guessed_task
from icm_ray.importing.writing import adapter_names
from icm_ray.suites import SUITE_FILE
from icm_ray.suites.source import ENDINGS

RECIPE = "pipeline.yaml"
MINUTES = 60
GUESS = "  # guessed"


@dataclass(frozen=True)
class FirstFiles:
    """What `init` found.

    Attributes:
        folder: The suite's folder, which holds the data.
        adapters: Path by name.
        base: Base of the adapters, as they name it.
        tasks: By name: what is guessed of a task.
        notes: What is left to do, one line each.
    """

    folder: Path
    adapters: Mapping[str, str]
    base: str
    tasks: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]


def look(folder: Path, paths: Sequence[str]) -> FirstFiles:
    """Read adapters' configs and the first rows of data files; nothing is written.

    Raises:
        InputError: an adapter is broken, or there are no data files.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Put <task>.jsonl or <task>.parquet into it.")
    names = adapter_names(folder_names(paths))
    files = open_all(list(zip(names, map(Path, paths), strict=True)), "keep")
    data = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in ENDINGS}
    if not data:
        raise InputError(f"{folder}: no data. Put <task>.jsonl or <task>.parquet into it.")
    named = _by_task(names, list(data))
    by_name = {named[file.name]: file for file in files}
    tasks = {
        task: guessed_task(file, is_language_model=_is_language_model(by_name.get(task), files))
        for task, file in data.items()
    }
    bases = sorted({file.base_model or "FILL_IN" for file in files})
    notes = [f"base: the adapters name {', '.join(bases)}; say which one."] * (len(bases) > 1)
    lone, unseen = sorted(by_name.keys() - data.keys()), sorted(data.keys() - by_name.keys())
    notes += [f"{name}: no data of that name, so it is merged and unproven." for name in lone]
    notes += [f"{task}: no adapter of that name, so it is an unseen task." for task in unseen]
    adapters = {named[name]: path for name, path in zip(names, paths, strict=True)}
    return FirstFiles(folder, adapters, bases[0], tasks, notes)


def _by_task(names: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Return the name each adapter gets: the one task that its own name holds, else its own."""
    found: dict[str, str] = {}
    for name in names:
        words = name.lower().replace("_", "-").split("-")
        near = [t for t in tasks if t == name or t.lower() in words]
        taken = len(near) == 1 and near[0] not in found.values()
        found[name] = near[0] if taken else name
    return found


def _is_language_model(file: AdapterFile | None, files: Sequence[AdapterFile]) -> bool:
    return (file or files[0]).config.get("task_type") == "CAUSAL_LM"


def suite_text(found: FirstFiles) -> str:
    """Return suite.yaml, every guess marked."""
    lines = [
        "# Tasks of this folder, as far as adapters and data files tell; look at every guess.",
        f"base: {_quoted(found.base)}",
        "tasks:",
    ]
    for task, keys in found.tasks.items():
        lines.append(f"  {_quoted(task)}:")
        lines += [f"    {key}: {_quoted(value)}{GUESS}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def recipe_text(found: FirstFiles) -> str:
    """Return the recipe of jobs.pipeline that tries every method the data allow."""
    name = adapter_names([str(found.folder.resolve())])[0]
    lines = [
        "# Every merge that the data allow, within the budget; the best one is written.",
        "#",
        f"#     icm-ray run pipeline -c {one_line(str(found.folder / RECIPE))}",
        f"name: {_quoted(name)}",
        f"suite: {_quoted(str(found.folder))}",
        f"output: {_quoted(f'runs/{name}')}",
        "adapters:",
        *(f"  - {{name: {_quoted(n)}, path: {_quoted(p)}}}" for n, p in found.adapters.items()),
        f"budget: {{minutes: {MINUTES}}}",
    ]
    return "\n".join(lines) + "\n"


def write_first_files(found: FirstFiles) -> list[Path]:
    """Write both files; none is replaced.

    Raises:
        RecipeError: one is there already.
    """
    texts = {SUITE_FILE: suite_text(found), RECIPE: recipe_text(found)}
    for name, path in found.adapters.items():
        AdapterRef(name=name, path=path)  # what no recipe may hold is said here
    places = {found.folder / name: text for name, text in texts.items()}
    if there := [path for path in places if path.exists()]:
        raise RecipeError([f"{path}: exists. Move it away, or go on with it." for path in there])
    for path, text in places.items():
        path.write_text(text, encoding="utf-8")
    return list(places)


def _quoted(value: str) -> str:
    import yaml

    flat = yaml.safe_dump(value, default_style=None, width=10**6, allow_unicode=False)
    return flat.removesuffix("...\n").strip() if "{" not in value else f'"{value}"'
