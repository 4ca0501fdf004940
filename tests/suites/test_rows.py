"""Rows of strangers' files: limits with names, and each line checked where it is read."""

import json
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icm_ray.errors import InputError
from icm_ray.suites import load_folder, rows
from icm_ray.suites.rows import MAX_FILE_BYTES, MAX_ROW_BYTES, json_rows, table_rows


def lines(folder: Path, content: bytes) -> Path:
    (folder / "mood.jsonl").write_bytes(content)
    return folder / "mood.jsonl"


def repeated(path: Path, text: str, count: int) -> Path:
    """Write a table that says `text` over and over and holds it once."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": column}), path)
    return path


def problem_of(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load_folder(folder, "mood")
    return error.value.problems[0]


def test_a_mark_of_byte_order_is_fine(tmp_path: Path) -> None:
    lines(tmp_path, b"\xef\xbb\xbf" + '{"text": "gut\u00e9"}\n'.encode())
    assert load_folder(tmp_path, "mood").texts == ("gut\u00e9",)
    lines(tmp_path, b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    assert "line 2: not JSON (Unexpected UTF-8 BOM" in problem_of(tmp_path)


def test_lines_end_in_any_way_a_system_ends_them(tmp_path: Path) -> None:
    lines(tmp_path, b'{"text": "a"}\r\n\r\n{"text": "b"}')
    assert load_folder(tmp_path, "mood").texts == ("a", "b")


@pytest.mark.parametrize("key", ["text", "document", "split"])
def test_half_a_surrogate_pair_is_named_with_its_line(tmp_path: Path, key: str) -> None:
    row = {"text": "w1", "split": "calibration", key: "w1 \ud800 w2"}
    lines(tmp_path, b'{"text": "fine"}\n' + json.dumps(row).encode())
    problem = problem_of(tmp_path)
    assert f"mood.jsonl: line 2: {key} holds half a surrogate pair at character 4" in problem
    assert problem.isascii()


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    lines(tmp_path, rb'{"text": "\ud83d\ude00"}')
    assert load_folder(tmp_path, "mood").texts == ("\U0001f600",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"text": "a"}\n{"text": "\xe9"}', "line 2: byte 10: not UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "line 1: byte 0: not UTF-8"),
        (b'{"text": "a"}\n\n[1]', "line 3: a list but expected an object"),
        (b'{"text": "a", "target": ' + b"9" * 5000 + b"}", "line 1: not JSON (a number too long)"),
        (b'{"text": "a", "target": 1' + b"0" * 400 + b"}", "line 1: target is 1000"),
        (b'{"text": "a", "target": 1e999}', "line 1: target is inf but expected a finite"),
        (b"[" * 100_000, "line 1: not JSON (nested too deeply)"),
        (b"\x1f\x8b\x08\x00", "line 1: byte 1: not UTF-8"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, content: bytes, text: str) -> None:
    path = lines(tmp_path, content)
    problem = problem_of(tmp_path)
    assert problem.startswith(f"{path}: ")
    assert text in problem


def test_a_long_line_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "mood.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "short"}\n{"text": "')
        file.truncate(24 * MAX_ROW_BYTES)
    assert f"line 2: over {MAX_ROW_BYTES} bytes" in problem_of(tmp_path)


def test_what_all_rows_come_to_has_a_limit(tmp_path: Path, monkeypatch) -> None:
    path = lines(tmp_path, b'{"text": "abcdef"}\n' * 10)
    assert len(list(json_rows(path))) == 10
    monkeypatch.setattr(rows, "MAX_FILE_BYTES", 100)
    assert "line 6: more than 100 bytes" in problem_of(tmp_path)
    monkeypatch.setattr(rows, "MAX_FILE_BYTES", 10_000)
    monkeypatch.setattr(rows, "MAX_ROWS", 7)
    assert "line 8: more than 10000 bytes or 7 rows" in problem_of(tmp_path)
    path.unlink()
    repeated(tmp_path / "mood.parquet", "a", 8)
    assert "mood.parquet: more than 10000 bytes or 7 rows" in problem_of(tmp_path)


@pytest.mark.timeout(60)
def test_a_small_table_that_decodes_to_gigabytes_is_not_decoded(tmp_path: Path) -> None:
    path = repeated(tmp_path / "mood.parquet", "x" * (MAX_ROW_BYTES - 1), 600)
    assert path.stat().st_size < 1_000_000 < MAX_FILE_BYTES < 600 * (MAX_ROW_BYTES - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "row 126: more than" in problem_of(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_long_row_of_a_table_is_named(tmp_path: Path) -> None:
    texts = ["short", "x" * (MAX_ROW_BYTES + 1)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "mood.parquet")
    assert f"row 2: over {MAX_ROW_BYTES} bytes" in problem_of(tmp_path)


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_tables_of_every_kind_of_text_are_read_in_their_order(
    tmp_path: Path, kind: pa.DataType, dictionary: bool
) -> None:
    texts = [f"text {i % 700}" for i in range(1500)]
    table = pa.table(
        {
            "other": pa.array([[1]] * 1500),
            "text": pa.array(texts, kind),
            "target": [None if i % 2 else float(i) for i in range(1500)],
            "document": list(range(1500)),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=dictionary, row_group_size=900)
    found = list(table_rows(tmp_path / "x.parquet", ("text", "target", "document", "split")))
    assert [where for where, _ in found] == [f"row {i + 1}" for i in range(1500)]
    assert [row["text"] for _, row in found] == texts
    assert found[2][1] == {"text": "text 2", "target": 2.0, "document": 2}
    assert found[3][1]["target"] is None


def test_columns_in_columns_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [["a"], ["b"]]}), tmp_path / "mood.parquet")
    assert "mood.parquet: column text: list" in problem_of(tmp_path)


def test_a_table_that_is_cut_or_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mood.parquet"
    bad = pa.array([b"fine", b"\xff\xfe"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, bad.buffers())}), path)
    assert "mood.parquet: not a readable Parquet file" in problem_of(tmp_path)
    pq.write_table(pa.table({"text": ["a" * 100] * 100}), path)
    path.write_bytes(path.read_bytes()[:-50])
    assert "mood.parquet: not a readable Parquet file" in problem_of(tmp_path)


def test_a_file_of_problems_alone_is_not_read_to_its_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("icm_ray.suites.folder.MAX_PROBLEMS", 100)
    lines(tmp_path, b'{"text": ""}\n' * 1000)
    with pytest.raises(InputError) as error:
        load_folder(tmp_path, "mood")
    assert error.value.problems[-1].endswith("81 more problems.")
