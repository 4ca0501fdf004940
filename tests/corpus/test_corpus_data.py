"""Class: data files whose lines are none, at the door of a job, before any Ray process starts."""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from command_samples import save_lora
from corpus_cases import SECRET, Case, every, listed
from ray_samples import write_yaml

from icm_ray.command import run_job
from icm_ray.config import EvidenceRecipe
from icm_ray.suites.rows import MAX_ROW_BYTES
from jobs.evidence import work

GOOD = b'{"text": "of the sun"}\n{"text": "the moon"}\n'


def lines(word: str, content: bytes) -> Case:
    return Case(lambda folder: (folder / "b.jsonl").write_bytes(content), 3, word, "b.jsonl")


def instead(word: str, write: object, names: str = "b.parquet") -> Case:
    """Return a case without lines, and with what `write` leaves."""

    def spoil(folder: Path) -> None:
        (folder / "b.jsonl").unlink()
        write(folder)  # type: ignore[operator]

    return Case(spoil, 3, word, names)


def long_line(folder: Path) -> None:
    with (folder / "b.jsonl").open("wb") as file:
        file.write(b'{"text": "short"}\n{"text": "')
        file.truncate(24 * MAX_ROW_BYTES)


def bomb(folder: Path) -> None:
    """A table of half a megabyte that decodes to gigabytes."""
    one = pa.DictionaryArray.from_arrays(
        pa.array([0] * 600, pa.int32()), pa.array(["x" * (MAX_ROW_BYTES - 1)])
    )
    pq.write_table(pa.table({"text": one}), folder / "b.parquet")


CASES = {
    "data_empty": lines("no examples", b""),
    "data_bad_line_3": lines("line 3: not JSON", GOOD + b"{'text': 'x'}\n"),
    "data_secret_line": lines("line 1: not JSON", SECRET.encode()),
    "data_latin1": lines("line 3: byte 10: not UTF-8", GOOD + b'{"text": "\xe9"}'),
    "data_utf16": lines("line 1: byte 0: not UTF-8", GOOD.decode().encode("utf-16")),
    "data_null": lines("line 3: text is None", GOOD + b'{"text": null}'),
    "data_surrogate": lines("line 3: text holds half a surrogate", GOOD + b'{"text": "a \\ud800"}'),
    "data_nul": lines("line 3", GOOD + b"\0\0\0\n"),
    "data_24mb_line": Case(long_line, 3, f"line 2: over {MAX_ROW_BYTES} bytes", "b.jsonl"),
    "data_gzip": lines("line 1: byte 1: not UTF-8", gzip.compress(GOOD)),
    "data_gzip_bomb": lines("not UTF-8", gzip.compress(bytes(10**7))),
    "data_parquet_bomb": instead("more than", bomb),
    "data_no_parquet": instead("not a readable", lambda f: (f / "b.parquet").write_bytes(b"PAR1")),
    "data_missing": instead("neither b.parquet nor b.jsonl", lambda f: None, "data"),
    "data_no_folder": Case(shutil.rmtree, 3, "no such folder", "data"),
}


@pytest.mark.timeout(60)
@every(CASES)
def test_data(case, tiny_bert, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in "ab":
        (data / f"{name}.jsonl").write_bytes(GOOD)
    case.spoil(data)
    refs = [{"name": n, "path": str(save_lora(tmp_path / n, s))} for s, n in enumerate("ab")]
    plain = {"base": str(tiny_bert), "adapters": refs, "data": {"path": str(data)}}
    recipe = write_yaml(tmp_path / "r.yaml", {**plain, "output": str(tmp_path / "out")})
    before, started = listed(tmp_path), ray.is_initialized()
    code = run_job(EvidenceRecipe, work, "", ["-c", str(recipe)])
    told = capsys.readouterr()
    errors = told.err.splitlines()
    assert code == case.code, errors
    assert any(case.word in line and case.names in line for line in errors), errors
    assert all(line.startswith("error: ") and line.isprintable() for line in errors)
    assert SECRET not in told.out + told.err
    assert ray.is_initialized() == started
    results = json.loads((tmp_path / "out.results.json").read_text())
    assert results["exit_code"] == case.code
    (tmp_path / "out.results.json").unlink()
    assert listed(tmp_path) == before
