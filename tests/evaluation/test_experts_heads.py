"""Ready heads meet the tasks they are for."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from icm_ray.errors import InputError
from icm_ray.evaluation.experts import Expert, heads_of
from icm_ray.evaluation.heads import Head
from icm_ray.suites import checked_suite

NAMED = {"kind": "classification", "classes": ["bad", "good", "fair"], "head": "head.safetensors"}
SHOWN = {"kind": "classification", "head": "head.safetensors"}
NUMBER = {"kind": "regression", "head": "head.safetensors"}


def problems_of(folder: Path, task: dict[str, object], width: int) -> list[str]:
    """What is said of a head of some outputs, for a task whose rows show classes 0 and 1."""
    Head(torch.zeros(width, 4), torch.zeros(width)).save(folder / "head.safetensors")
    (folder / "suite.yaml").write_text(yaml.safe_dump({"base": "any", "tasks": {"mood": task}}))
    rows = [{"text": f"text {n}", "answer": n % 2, "document": str(n)} for n in range(20)]
    (folder / "mood.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = checked_suite(folder)
    try:
        heads = heads_of(suite, {"mood": Expert("mood", folder)})[1]
    except InputError as error:
        return list(error.problems)
    assert heads["mood"] is not None
    return []


@pytest.mark.parametrize(("task", "width"), [(NAMED, 3), (SHOWN, 2), (SHOWN, 5), (NUMBER, 1)])
def test_a_head_of_a_tasks_width_is_taken(tmp_path: Path, task: dict, width: int) -> None:
    # Rows alone may not show the last classes of their head.
    assert problems_of(tmp_path, task, width) == []


@pytest.mark.parametrize(
    ("task", "width", "words"),
    [
        (NAMED, 2, "a head of 2 outputs but 3 are expected, the 3 classes of a classification"),
        (NAMED, 5, "a head of 5 outputs but 3 are expected"),
        (SHOWN, 1, "a head of 1 outputs but 2 are expected"),
        (NUMBER, 3, "a head of 3 outputs but 1 are expected of a regression"),
    ],
)
def test_another_head_is_refused(tmp_path: Path, task: dict, width: int, words: str) -> None:
    (line,) = problems_of(tmp_path, task, width)
    assert line.startswith("mood: ")
    assert words in line
