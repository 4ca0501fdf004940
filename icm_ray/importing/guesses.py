"""What a data file says of its task: columns by their names and first rows, each a guess."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from icm_ray.suites.rows import json_rows, table_rows, table_schema

LOOKED_AT = 200
"""Rows that are read of a file."""
MAX_CLASSES = 50
MESSAGES = ("messages", "conversation", "conversations", "chat")
PROMPTS = ("prompt", "question", "instruction", "query", "input", "source")
ANSWERS = ("answer", "response", "completion", "reply", "output", "target", "label", "labels")
TEXTS = ("text", "sentence", "sentence1", "premise", "content", "document_text", "body")
IMAGES = ("image", "images", "picture", "pictures", "photo", "photos")
PAIRS = ("text_pair", "sentence2", "hypothesis")
BOXES = ("boxes", "objects", "bboxes", "annotations")
SCORES = ("target", "label", "labels", "answer", "class", "score", "similarity")


def first_rows(file: Path) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Return a file's columns, and its first rows: plain values, and lists of answers."""
    if file.suffix != ".parquet":
        rows = [row for _, row in islice(json_rows(file), LOOKED_AT)]
        return list(dict.fromkeys(name for row in rows for name in row)), rows
    schema = table_schema(file)
    answers = {name.lower() for name in (*SCORES, *BOXES)}
    plain = [
        name
        for name in schema.names
        if schema.field(name).type.num_fields == 0 or name.lower() in answers
    ]
    return schema.names, [row for _, row in islice(table_rows(file, plain, nested=True), LOOKED_AT)]


def guessed_task(file: Path, *, is_language_model: bool) -> dict[str, Any]:
    """Return what `suite.yaml` says of a task whose data are in `file`: kind and columns.

    Args:
        file: JSON lines or Parquet.
        is_language_model: Whether the task's adapter is of a causal language model.
    """
    columns, rows = first_rows(file)
    image = _first(columns, IMAGES)
    seen = {"image": image} if image else {}
    if name := _first(columns, MESSAGES):
        return {"kind": "generation", "messages": name, **seen}
    text, prompt = _first(columns, TEXTS), _first(columns, PROMPTS)
    if prompt and not text:
        answer = _first([c for c in columns if c != prompt], ANSWERS)
        place = f"{{{image}}} " if image else ""
        asked = {"kind": "generation", **seen, "prompt": f"{place}{{{prompt}}}"}
        return {**asked, "answer": answer} if answer else asked
    if image and not text:
        return _of_image(columns, rows, image)
    text = text or _longest(columns, rows)
    if text is None:
        return {"kind": "language_modelling", "text": "FILL_IN"}
    found: dict[str, Any] = {"text": text}
    if pair := _first(columns, PAIRS):
        found["text_pair"] = pair
    score = _first([c for c in columns if c != text], SCORES)
    values = [row[score] for row in rows if row.get(score) is not None] if score else []
    if score and values:
        return {"kind": _kind_of(values), **found, "answer": score}
    return {"kind": "language_modelling" if is_language_model else "classification", **found}


def _of_image(
    columns: Sequence[str], rows: Sequence[Mapping[str, Any]], image: str
) -> dict[str, Any]:
    """Return what `suite.yaml` says of pictures: of the whole, of their patches, or of boxes."""
    name = _first([c for c in columns if c != image], (*BOXES, *SCORES))
    values = [row[name] for row in rows if row.get(name) is not None] if name else []
    if not values:
        return {"kind": "classification", "image": image}
    found = {"image": image, "answer": name}
    if not isinstance(values[0], list):
        return {"kind": _kind_of(values), **found}
    inner = [one for value in values for one in value]
    if all(isinstance(one, list) for one in inner):
        return {"kind": "detection", **found, "classes": _classes_of(inner)}
    whole = all(isinstance(one, str | int) for one in inner)
    return {"kind": "dense_classification" if whole else "dense_regression", **found}


def _classes_of(boxes: Sequence[Sequence[Any]]) -> list[str]:
    """Return the names of the boxes' classes, which stand last, or of their indices."""
    said = {box[-1] for box in boxes if box}
    if all(isinstance(one, str) for one in said):
        return sorted(said)
    return [str(index) for index in range(int(max(said, default=0)) + 1)]


def _first(columns: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the column whose name stands first among known ones, in any case of letters."""
    by_name = {name.lower(): name for name in columns}
    return next((by_name[name] for name in known if name in by_name), None)


def _longest(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the column with the longest texts."""
    sizes = {
        name: sum(len(row[name]) for row in rows if isinstance(row.get(name), str))
        for name in columns
    }
    best = max(sizes, key=lambda name: sizes[name], default=None)
    return best if best is not None and sizes[best] else None


def _kind_of(values: Sequence[Any]) -> str:
    if all(isinstance(value, str) for value in values):
        few = len(set(values)) <= min(MAX_CLASSES, max(2, len(values) // 2))
        return "classification" if few else "generation"
    whole = all(isinstance(value, int) and 0 <= value < MAX_CLASSES for value in values)
    return "classification" if whole else "regression"
