"""A user's own data: one `<task>.parquet` or `<task>.jsonl` per task in a folder.

Columns (or keys of each JSON line): `text`, and optionally `target` (a number: the class index
or the value), `split` and `document`. Every problem of a file is told at once, by line.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from icm_ray.errors import InputError
from icm_ray.suites.rows import Row, json_rows, table_rows, table_schema
from icm_ray.suites.tasks import Examples

COLUMNS = ("text", "target", "split", "document")
LOOKALIKES = ("label", "labels", "class", "score", "value", "y")
"""Names that mean `target` elsewhere; reading such a file as unlabelled would be a silent loss."""

MAX_TOLD = 20
MAX_PROBLEMS = 10_000
"""After so many the file is not read to its end."""

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def load_folder(path: str | Path, task: str, split: str | None = None) -> Examples:
    """Return a user's examples of one task, in file order.

    Args:
        path: Folder with `<task>.parquet` or `<task>.jsonl`.
        task: Name of the task, which is the name of the file.
        split: Keep only rows whose `split` says so; None keeps all rows.

    Returns:
        Examples; targets are NaN when the file has none, documents are row numbers unless given.

    Raises:
        InputError: The file is missing, unreadable or wrong; one line a problem.
    """
    file = _find(Path(path).expanduser(), task)
    problems: list[str] = []
    splits: set[str] = set()
    bare: list[str] = []
    kept: list[Row] = []
    count = 0
    for where, row in _rows(file):
        count += 1
        problems += [f"{file}: {where}: {problem}" for problem in _problems(row, split)]
        splits.add(str(row.get("split")))
        bare += [where] if row.get("target") is None else []
        if split is None or row.get("split") == split:
            kept.append((where, row))
        if len(problems) > MAX_PROBLEMS:
            break
    if not problems and bare and len(bare) < count:
        problems = [
            f"{file}: {bare[0]}: no target but other lines have one ({len(bare)} of {count} lack "
            "it). Give every line a target, or none."
        ]
    if problems:
        more = len(problems) - MAX_TOLD
        raise InputError(
            problems[:MAX_TOLD] + ([f"{file}: {more} more problems."] if more > 0 else [])
        )
    if not kept:
        held = f"split {split!r} but the file has {', '.join(sorted(splits))}"
        wanted = held if split is not None and splits else "no examples"
        raise InputError(f"{file}: {wanted}. Add examples, or name another split.")
    return _examples(kept)


def _find(folder: Path, task: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give the folder that holds {task}.jsonl.")
    # A task name is a file name; anything that walks elsewhere is a mistake or an attack.
    if Path(task).name != task:
        raise InputError(f"{folder}: task {task!r} but expected a plain file name without '/'.")
    found = [folder / f"{task}{end}" for end in (".parquet", ".jsonl")]
    found = [file for file in found if file.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{folder}: both {task}.parquet and {task}.jsonl. Remove one of them.")
    raise InputError(f"{folder}: neither {task}.parquet nor {task}.jsonl. Write one of them.")


def _rows(file: Path) -> Iterator[Row]:
    if file.suffix == ".parquet":
        _check_names(file, "columns", table_schema(file).names)
        yield from table_rows(file, COLUMNS)
        return
    for where, row in json_rows(file):
        _check_names(file, where, list(row))
        yield where, row


def _check_names(file: Path, where: str, names: list[str]) -> None:
    if "text" not in names:
        raise InputError(
            f"{file}: {where}: {', '.join(names) or 'nothing'} but expected 'text'. Rename the "
            "column that holds the text."
        )
    near = [name for name in names if name.lower() in LOOKALIKES]
    if "target" not in names and near:
        raise InputError(
            f"{file}: {where}: {near[0]!r} but expected 'target'. Rename it, or drop it if the "
            "data are unlabelled."
        )


def _problems(row: Mapping[str, Any], split: str | None) -> Iterator[str]:
    text, target = row.get("text"), row.get("target")
    if not isinstance(text, str):
        yield f"text is {_short(text)} but expected a string. Mend or drop the line."
    elif not text.strip():
        yield "text is empty but expected words. Mend or drop the line."
    for name in ("text", "split", "document"):
        if isinstance(row.get(name), str) and (half := _HALF_PAIR.search(row[name])):
            yield (
                f"{name} holds half a surrogate pair at character {half.start() + 1} but expected "
                "whole characters. Mend or drop the line."
            )
    if isinstance(target, bool) or not isinstance(target, int | float | None):
        yield (
            f"target is {_short(target)} but expected a number. Write the value, or the class "
            "index counted from 0."
        )
    elif target is not None and not _is_finite(target):
        yield f"target is {_short(target)} but expected a finite number. Mend or drop the line."
    if split is not None and not isinstance(row.get("split"), str):
        yield (
            f"split is {_short(row.get('split'))} but split {split!r} was asked for. Add the key."
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float can hold
        return False


def _examples(rows: list[Row]) -> Examples:
    import numpy as np

    targets = [math.nan if row.get("target") is None else row["target"] for _, row in rows]
    return Examples(
        texts=tuple(row["text"] for _, row in rows),
        targets=np.asarray(targets, dtype=np.float64),
        documents=tuple(str(row.get("document") or where) for where, row in rows),
    )
