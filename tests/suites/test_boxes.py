"""Boxes in a user's table: what is read, and what each wrong row is told in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from icm_ray.errors import ICMRayError
from icm_ray.suites import Suite, checked_suite

TASK = {"kind": "detection", "classes": ["cup", "pot"]}


def write(folder: Path, answers: list[Any], task: dict[str, Any] = TASK) -> Path:
    """Write a suite of one task with an image of 28 x 14 for each answer."""
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": {"things": task}}))
    rows = []
    for number, answer in enumerate(answers):
        name = f"{number}.png"
        Image.new("RGB", (28, 14), (number, 0, 0)).save(folder / name)
        rows.append({"image": name, "answer": answer, "split": "test"})
    (folder / "things.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(ICMRayError) as caught:
        checked_suite(folder).load("things", "test")
    return list(caught.value.problems)


def opened(folder: Path) -> Suite:
    return checked_suite(folder)


def test_boxes_are_filled_up_and_classes_are_names_or_indices(tmp_path: Path) -> None:
    answers = [[[0, 0, 10, 10, "pot"], [1.5, 2, 28, 14, 0]], [], [[3, 3, 4, 4, 1]]]
    suite = opened(write(tmp_path, answers))
    task, examples = suite.task("things"), suite.load("things", "test")
    assert (task.metric, task.outputs, task.headed, task.is_class) == ("map50", 6, True, False)
    assert examples.targets.shape == (3, 2, 5)
    assert examples.targets[0].tolist() == [[0, 0, 10, 10, 1], [1.5, 2, 28, 14, 0]]
    assert examples.targets[1, :, 4].tolist() == [-1, -1]
    assert examples.targets[2, :, 4].tolist() == [1, -1]
    assert examples.first(1).fingerprint != examples.fingerprint


def test_a_parquet_table_reads_the_same(tmp_path: Path) -> None:
    answers = [[[0.0, 0, 10, 10, 1], [1.5, 2, 28, 14, 0]], [], [[3.0, 3, 4, 4, 1]]]
    expected = opened(write(tmp_path, answers)).load("things", "test")
    rows = [json.loads(line) for line in (tmp_path / "things.jsonl").read_text().splitlines()]
    (tmp_path / "things.jsonl").unlink()
    kind = pa.list_(pa.list_(pa.float32()))
    columns = {name: [row[name] for row in rows] for name in ("image", "split")}
    table = pa.table({**columns, "answer": pa.array(answers, kind)})
    pq.write_table(table, tmp_path / "things.parquet")
    found = opened(tmp_path).load("things", "test")
    np.testing.assert_array_equal(found.targets, expected.targets)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("cup", "answer: 'cup' but a list of boxes is expected, [] for none"),
        ([[0, 0, 10, 10]], "answer[0]: [0, 0, 10, 10] but [x0, y0, x1, y1, class] is expected"),
        ([[5, 0, 5, 9, 0]], "answer[0]: [5, 0, 5, 9, 0] but 0 <= x0 < x1 and 0 <= y0 < y1"),
        ([[1, 1, 5, 9, 0], [0, 9, 5, 1, 0]], "answer[1]: [0, 9, 5, 1, 0] but 0 <= x0 < x1"),
        ([[-1, 0, 5, 9, 0]], "answer[0]: [-1, 0, 5, 9, 0] but 0 <= x0 < x1"),
        ([[0, 0, 5, "9", 0]], "answer[0]: '9' but a number is expected"),
        ([[0, 0, 5, 9, "cop"]], "answer[0]: 'cop' is none of the 2 classes. Did you mean 'cup'?"),
        ([[0, 0, 5, 9, 2]], "answer[0]: 2 but 0 to 1 is expected: an index of classes"),
        ([[0, 0, 29, 9, 0]], "box [0.0, 0.0, 29.0, 9.0, 0.0] but a box inside an image of 28 x 14"),
    ],
)
def test_every_wrong_row_is_named(tmp_path: Path, answer: Any, problem: str) -> None:
    (line,) = problems_of(write(tmp_path, [[], answer, [[0, 0, 1, 1, 0]]]))
    assert "things.jsonl: line 2: " in line
    assert problem in line


def test_what_suite_yaml_must_say(tmp_path: Path) -> None:
    (line,) = problems_of(write(tmp_path, [[]], {"kind": "detection"}))
    assert "tasks.things.classes: missing but a detection names them" in line
    (line,) = problems_of(write(tmp_path, [None], TASK))
    assert "the rows have no boxes but a detection needs some" in line
    (line,) = problems_of(write(tmp_path, [None], {"kind": "dense_regression"}))
    assert "the rows have no answers but a dense_regression needs some" in line
    (line,) = problems_of(write(tmp_path, [[], None], TASK))
    assert "line 2: no answer but other rows have one" in line
    (line,) = problems_of(write(tmp_path, [[]], {**TASK, "metric": "miou"}))
    assert "'miou' but a detection has one of map50, map" in line
    (line,) = problems_of(write(tmp_path, [[]], {**TASK, "prompt": "{image}"}))
    assert "image: a detection reads an image alone" in line


def test_images_have_one_size(tmp_path: Path) -> None:
    folder = write(tmp_path, [[], []])
    Image.new("RGB", (14, 14)).save(folder / "1.png")
    (line,) = problems_of(folder)
    assert "line 2: an image of 14 x 14 but 28 x 14 as in the first row is expected" in line
