"""A suite from its folder: `suite.yaml`, checked, with the tables it names.

`open_suite` reads the one file and no data; `checked_suite` looks at every row besides, and says
all that is wrong before anything is spent.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

from icm_ray.config import HubData, LmEvalData, SuiteFile, TaskFile
from icm_ray.config.loading import checked, read_yaml
from icm_ray.errors import ICMRayError, InputError, RecipeError, did_you_mean
from icm_ray.suites.hub_source import open_hub
from icm_ray.suites.lm_eval_source import open_lm_eval
from icm_ray.suites.own_scorer import KINDS, NAME, OwnScorer, own_scorer
from icm_ray.suites.source import find_table
from icm_ray.suites.suite import Suite
from icm_ray.suites.table import Table
from icm_ray.suites.tasks import FIDELITY, METRICS, Task, of_patches

SUITE_FILE = "suite.yaml"
LONGEST = 2048
"""Tokens of a row where a suite says nothing; a model's own length, if that is less."""
EXTRAS = {"bleu": ("sacrebleu", "bleu"), "chrf": ("sacrebleu", "bleu")}
"""Metrics of other packages, and the extra that brings them."""
NO_LABELS = ("token_likelihood", FIDELITY)
"""Metrics that read no answers."""


def open_suite(folder: Path, *, is_packaged: bool = False) -> Suite:
    """Return the suite of a folder; its data are looked at when they are asked for.

    Raises:
        RecipeError: everything that is wrong with `suite.yaml`.
        InputError: tables that are not there.
    """
    path = folder / SUITE_FILE
    if not path.is_file():
        raise RecipeError(f"{path}: no such file. Write one: docs/your_data.md shows how.")
    said = checked(SuiteFile, path, read_yaml(path))
    problems = [line for name, task in said.tasks.items() for line in _problems(name, task)]
    scorers = _own_scorers(folder, said, problems)
    if problems:
        raise RecipeError([f"{path}: {line}" for line in problems])
    if problems := _meetings(said):
        raise RecipeError([f"{path}: {line}" for line in problems])
    base, known = _base(folder, said)
    tables, missing = {}, []
    for name, task in said.tasks.items():
        try:
            if isinstance(task.data, HubData):
                source = open_hub(folder, f"{path}: tasks.{name}.data", task.data)
            elif isinstance(task.data, LmEvalData):
                source = open_lm_eval(folder, f"{path}: tasks.{name}.data", task.data, task.kind)
                if task.kind == "multiple_choice" and not (task.prompt or task.messages):
                    task = task.model_copy(update={"prompt": "{text}"})
            else:
                source = find_table(folder, name, task.data)
            tables[name] = Table(name, task, source, said.seed, known, is_packaged)
        except InputError as error:
            missing += error.problems
    if missing:
        raise InputError(dict.fromkeys(missing))  # tasks may share a table
    tasks = {
        name: replace(_task(name, task), scorer=scorers.get(name))
        for name, task in said.tasks.items()
    }
    return Suite(folder.resolve().name, base, tasks, folder, said.revision, tables, is_packaged)


def checked_suite(folder: Path) -> Suite:
    """Return the suite of a folder after a look at every row of its tables.

    Raises:
        RecipeError: everything that is wrong with `suite.yaml`.
        InputError: everything that is wrong with its data.
    """
    suite, problems = open_suite(folder), []
    tasks = {}
    for name, task in suite.tasks.items():
        try:
            tasks[name] = _completed(task, suite.tables[name])
        except ICMRayError as error:
            problems += error.problems
    if problems:
        raise InputError(dict.fromkeys(problems))
    return replace(suite, tasks=tasks)


def _problems(name: str, task: TaskFile) -> list[str]:
    """Return what is wrong with a task, but for its data."""
    where, lines = f"tasks.{name}", []
    is_own = task.metric is not None and NAME.fullmatch(task.metric)
    if is_own and task.kind not in KINDS:
        lines.append(f"{where}.metric: {task.metric!r} but a {task.kind} has none of one's own.")
    elif task.metric is not None and not is_own and task.metric not in METRICS[task.kind]:
        lines.append(
            f"{where}.metric: {task.metric!r} but a {task.kind} has one of "
            f"{', '.join(METRICS[task.kind])}.{did_you_mean(task.metric, METRICS[task.kind])}"
        )
    if task.metric in EXTRAS and importlib.util.find_spec(EXTRAS[task.metric][0]) is None:
        package, extra = EXTRAS[task.metric]
        lines.append(
            f"{where}.metric: {task.metric} but {package} is not installed. Run pip install "
            f"'icm-ray[{extra}]'."
        )
    asked = [key for key in ("text", "prompt", "messages") if getattr(task, key)]
    if task.image and not {"prompt", "messages"} & set(asked):
        asked.append("image")
        if isinstance(task.image, list):
            lines.append(
                f"{where}.image: a list but one column is read without prompt or messages. Name "
                "one, or write a prompt with their places."
            )
    if len(asked) > 1:
        lines.append(f"{where}: {' and '.join(asked)} but one of them is read. Keep one.")
    if task.text_pair and not task.text:
        lines.append(f"{where}.text_pair: without text but both are read together. Set text.")
    if task.classes and len(set(task.classes)) < len(task.classes):
        lines.append(f"{where}.classes: a name twice but different ones are expected.")
    if task.kind == "detection" and not task.classes:
        lines.append(f"{where}.classes: missing but a detection names them, in the head's order.")
    if task.classes and not task.kind.endswith("classification") and task.kind != "detection":
        lines.append(f"{where}.classes: a {task.kind} has none. Remove them.")
    if task.head is not None and task.kind not in ("classification", "regression"):
        lines.append(f"{where}.head: a {task.kind} has none. Remove it.")
    if task.head == "names" and task.kind == "regression":
        lines.append(f"{where}.head: names but a regression has none. Name a head's file.")
    if task.chat and task.prompt is None:
        lines.append(f"{where}.chat: without prompt. Set prompt, or messages.")
    return lines


def _own_scorers(folder: Path, said: SuiteFile, problems: list[str]) -> dict[str, OwnScorer]:
    """Return the tasks' scorers of their own; `problems` gets what is wrong with them."""
    scorers = {}
    for name, task in said.tasks.items():
        try:
            scorer = own_scorer(folder, task.metric or "")
        except RecipeError as error:
            problems += [f"tasks.{name}.metric: {line}" for line in error.problems]
            continue
        if scorer is not None:
            scorers[name] = scorer
    return scorers


def _meetings(said: SuiteFile) -> list[str]:
    """Return what is wrong with which adapters the tasks meet."""
    meets: dict[str, list[str]] = {}
    for name, task in said.tasks.items():
        meets.setdefault(task.expert or name, []).append(name)
    lines = [
        f"tasks.{names[1]}.expert: {adapter!r} is that of {names[0]} but each task has its own. "
        "Name another, or put their rows into one task."
        for adapter, names in meets.items()
        if names[1:]
    ]
    return lines + [
        f"tasks.{names[0]}.expert: {adapter!r} is the name of another task. Rename one of them."
        for adapter, names in meets.items()
        if adapter in said.tasks and adapter not in names
    ]


def _base(folder: Path, said: SuiteFile) -> tuple[str | None, tuple[str, ...]]:
    """Return the base as `prepare_base` takes it, and its classes if it is a folder with some."""
    if said.base is None or not (folder / said.base / "config.json").is_file():
        return said.base, ()
    place = folder / said.base
    try:
        labels = json.loads((place / "config.json").read_text(encoding="utf-8")).get("id2label")
        names = [labels[str(index)] for index in range(len(labels or {}))]
    except (ValueError, KeyError, AttributeError, TypeError):
        names = []  # whoever loads the base says what is wrong with it
    if not names or all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        names = []
    return str(place), tuple(map(str, names))


def _task(name: str, task: TaskFile) -> Task:
    """Return a task as far as it is known without its data."""
    return Task(
        name=name,
        kind=task.kind,
        metric=task.metric or METRICS[task.kind][0],
        classes=tuple(task.classes or ()),
        max_tokens=task.max_tokens or LONGEST,
        source=task.source,
        licence=task.licence,
        max_new_tokens=task.max_new_tokens if task.kind == "generation" else 0,
        head=task.head,
        expert=task.expert or "",
    )


def _completed(task: Task, table: Table) -> Task:
    """Return a task with what its rows say: its classes, and whether they have answers."""
    found, metric = table.found, task.metric
    labelled = found.labelled or task.kind == "language_modelling"  # texts say it themselves
    if not labelled and of_patches(task.kind):
        what, more = "answers", ""
        if task.kind == "detection":
            what, more = "boxes", ", and write [] where an image shows nothing"
        raise InputError(
            f"suite.yaml: tasks.{task.name}: the rows have no {what} but a {task.kind} needs some. "
            f"Name their column with answer:{more}."
        )
    if not labelled and metric not in NO_LABELS:
        if table.task.metric is not None:
            raise InputError(
                f"suite.yaml: tasks.{task.name}.metric: {metric!r} but the rows have no answers. "
                f"Set {FIDELITY}, or name the column of answers."
            )
        metric = FIDELITY
    return replace(task, classes=found.classes, metric=metric, labelled=labelled)
