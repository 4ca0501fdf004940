"""A user's own data: what is read, and what each mistake is told in."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icm_ray.errors import InputError
from icm_ray.suites import load_folder


def write_lines(folder: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / "mood.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_table(folder: Path, **columns: list) -> Path:
    path = folder / "mood.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def problems_of(folder: Path, split: str | None = None) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        load_folder(folder, "mood", split)
    return caught.value.problems


def test_reads_json_lines(tmp_path: Path) -> None:
    write_lines(
        tmp_path,
        {"text": "good\u2028day", "target": 1, "split": "train", "document": "a"},
        "",
        {"text": "bad day", "target": 0, "split": "test"},
    )
    every = load_folder(tmp_path, "mood")
    assert every.texts == ("good\u2028day", "bad day")
    assert every.targets.dtype == "float64"
    assert every.targets.tolist() == [1.0, 0.0]
    assert every.documents == ("a", "line 3")
    assert load_folder(str(tmp_path), "mood", "test").texts == ("bad day",)


def test_reads_parquet(tmp_path: Path) -> None:
    write_table(tmp_path, text=["x", "y"], target=[0.5, -1.5], split=["train", "test"], id=[7, 8])
    examples = load_folder(tmp_path, "mood", "train")
    assert (examples.texts, examples.targets.tolist()) == (("x",), [0.5])
    assert examples.documents == ("row 1",)


def test_unlabelled_texts_have_nan_targets(tmp_path: Path) -> None:
    write_lines(tmp_path, {"text": "x"}, {"text": "y"})
    assert all(math.isnan(value) for value in load_folder(tmp_path, "mood").targets)


def test_every_problem_is_told_with_its_line(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path,
        {"text": "fine", "target": 1},
        {"text": " ", "target": "happy"},
        {"text": 3, "target": True},
        '{"text": "x", "target": NaN}',
    )
    assert problems_of(tmp_path) == (
        f"{path}: line 2: text is empty but expected words. Mend or drop the line.",
        f"{path}: line 2: target is 'happy' but expected a number. Write the value, or the class "
        "index counted from 0.",
        f"{path}: line 3: text is 3 but expected a string. Mend or drop the line.",
        f"{path}: line 3: target is True but expected a number. Write the value, or the class "
        "index counted from 0.",
        f"{path}: line 4: target is nan but expected a finite number. Mend or drop the line.",
    )


def test_many_problems_are_cut_short_with_their_count(tmp_path: Path) -> None:
    write_lines(tmp_path, *({"text": ""} for _ in range(50)))
    told = problems_of(tmp_path)
    assert len(told) == 21
    assert told[-1].endswith("30 more problems.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{'text': 'x'}", "line 1: not JSON"),
        ("[1]", "line 1: a list but expected an object"),
        ({"sentence": "x"}, "line 1: sentence but expected 'text'"),
        ({"text": "x", "label": 1}, "line 1: 'label' but expected 'target'"),
        ("[" * 100_000, "line 1: not JSON (nested too deeply)"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, row: object, expected: str) -> None:
    path = write_lines(tmp_path, row)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{path}: ")
    assert expected in problem


def test_wrong_columns_of_a_table_are_named(tmp_path: Path) -> None:
    path = write_table(tmp_path, text=["x"], label=[1])
    assert problems_of(tmp_path)[0].startswith(f"{path}: columns: 'label' but expected 'target'.")
    path = write_table(tmp_path, text=["x", None], target=[1, 2])
    assert problems_of(tmp_path) == (
        f"{path}: row 2: text is None but expected a string. Mend or drop the line.",
    )


def test_some_lines_without_a_target_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {"text": "x", "target": 1}, {"text": "y"})
    assert problems_of(tmp_path) == (
        f"{path}: line 2: no target but other lines have one (1 of 2 lack it). Give every line a "
        "target, or none.",
    )


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {"text": "x", "split": "train"})
    assert problems_of(tmp_path, "test")[0].startswith(
        f"{path}: split 'test' but the file has train."
    )
    path = write_lines(tmp_path, {"text": "x"})
    assert problems_of(tmp_path, "test")[0].startswith(f"{path}: line 1: split is None but split")


def test_missing_broken_and_ambiguous_files_are_named(tmp_path: Path) -> None:
    assert "neither mood.parquet nor mood.jsonl" in problems_of(tmp_path)[0]
    assert "no such folder" in problems_of(tmp_path / "nowhere")[0]
    (tmp_path / "mood.parquet").write_bytes(b"PAR1 not really")
    assert "not a readable Parquet file" in problems_of(tmp_path)[0]
    (tmp_path / "mood.jsonl").write_bytes(b"\xff")
    assert "both mood.parquet and mood.jsonl" in problems_of(tmp_path)[0]
    (tmp_path / "mood.parquet").unlink()
    assert "byte 0: not UTF-8" in problems_of(tmp_path)[0]
    (tmp_path / "mood.jsonl").write_text("\n")
    assert "no examples" in problems_of(tmp_path)[0]


def test_a_task_name_cannot_walk_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write_lines(tmp_path, {"text": "x"})
    with pytest.raises(InputError, match="plain file name"):
        load_folder(tmp_path / "inner", "../mood")
