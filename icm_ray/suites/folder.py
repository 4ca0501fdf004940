"""A user's own data: one `<task>.parquet` or `<task>.jsonl` per task in a folder.

Columns (or keys of each JSON line): `text`, and optionally `target` (a number: the class index
or the value), `split` and `document`. Every problem of a file is told at once, by line.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from icm_ray.errors import InputError
from icm_ray.suites.tasks import Examples

COLUMNS = ("text", "target", "split", "document")
LOOKALIKES = ("label", "labels", "class", "score", "value", "y")
"""Names that mean `target` elsewhere; reading such a file as unlabelled would be a silent loss."""

MAX_TOLD = 20

Row = tuple[str, Mapping[str, Any]]
"""Where the row stands, in words, and its values."""


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
    rows = list(_parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file))
    problems = [
        f"{file}: {where}: {problem}" for where, row in rows for problem in _problems(row, split)
    ]
    if not problems:
        problems = _mixed_targets(file, rows)
    if problems:
        more = len(problems) - MAX_TOLD
        raise InputError(
            problems[:MAX_TOLD] + ([f"{file}: {more} more problems."] if more > 0 else [])
        )
    return _examples(file, rows, split)


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


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(file)
        names = reader.schema_arrow.names
        _check_names(file, "columns", names)
        table = reader.read(columns=[name for name in COLUMNS if name in names])
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: not a readable Parquet file ({error}). Write it again."
        ) from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", row


def _json_rows(file: Path) -> Iterator[Row]:
    # Split on "\n" only: str.splitlines would also cut at U+2028 inside a JSON string.
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start}: not UTF-8. Save it as UTF-8.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise InputError(
                f"{file}: {where}: not JSON ({reason}). Write one JSON object per line."
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"{file}: {where}: a {type(row).__name__} but expected an object. Write one "
                'JSON object per line, as {"text": "...", "target": 0}.'
            )
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
        yield f"text is {text!r} but expected a string. Mend or drop the line."
    elif not text.strip():
        yield "text is empty but expected words. Mend or drop the line."
    if isinstance(target, bool) or not isinstance(target, int | float | None):
        yield (
            f"target is {target!r} but expected a number. Write the value, or the class index "
            "counted from 0."
        )
    elif target is not None and not math.isfinite(target):
        yield f"target is {target!r} but expected a finite number. Mend or drop the line."
    if split is not None and not isinstance(row.get("split"), str):
        yield f"split is {row.get('split')!r} but split {split!r} was asked for. Add the key."


def _mixed_targets(file: Path, rows: list[Row]) -> list[str]:
    missing = [where for where, row in rows if row.get("target") is None]
    if not missing or len(missing) == len(rows):
        return []
    return [
        f"{file}: {missing[0]}: no target but other lines have one ({len(missing)} of "
        f"{len(rows)} lack it). Give every line a target, or none."
    ]


def _examples(file: Path, rows: list[Row], split: str | None) -> Examples:
    import numpy as np

    kept = [(where, row) for where, row in rows if split is None or row["split"] == split]
    if not kept:
        held = sorted({str(row["split"]) for _, row in rows}) if split is not None else []
        wanted = f"split {split!r} but the file has {', '.join(held)}" if held else "no examples"
        raise InputError(f"{file}: {wanted}. Add examples, or name another split.")
    targets = [math.nan if row.get("target") is None else row["target"] for _, row in kept]
    return Examples(
        texts=tuple(row["text"] for _, row in kept),
        targets=np.asarray(targets, dtype=np.float64),
        documents=tuple(str(row.get("document") or where) for where, row in kept),
    )
