"""The text suite: splits that share nothing, targets in range, the same bytes every time."""

import hashlib
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from icm_ray.errors import InputError
from icm_ray.suites import SPLITS, SUITES, open_suite
from icm_ray.suites.text.build_extracts import SIZES, divide, fold, to_table
from icm_ray.suites.text.sources import Candidate

TEXT = SUITES["text"]
DATA = TEXT.folder / "data"
TASKS = sorted(TEXT.tasks)
MOST_BYTES = 3_000_000


@pytest.mark.parametrize("task", TASKS)
def test_no_text_or_document_is_in_two_splits(task: str) -> None:
    texts: set[str] = set()
    documents: set[str] = set()
    for split in SPLITS:
        examples = TEXT.load(task, split)
        folded = {fold(text) for text in examples.texts}
        assert len(folded) == len(examples)
        assert not folded & texts
        assert not set(examples.documents) & documents
        texts |= folded
        documents |= set(examples.documents)


@pytest.mark.parametrize("task", TASKS)
def test_splits_have_their_sizes(task: str) -> None:
    assert {split: len(TEXT.load(task, split)) for split in SPLITS} == SIZES


@pytest.mark.parametrize("task", [name for name in TASKS if TEXT.tasks[name].classes])
def test_every_class_is_in_every_split(task: str) -> None:
    classes = range(len(TEXT.tasks[task].classes))
    for split in SPLITS:
        assert sorted(set(TEXT.load(task, split).targets)) == list(classes)
        # Near-balanced: a constant guess is far below any model.
        most = max(Counter(TEXT.load(task, split).targets).values())
        assert most <= 1.5 * SIZES[split] / len(classes)


@pytest.mark.parametrize(
    ("task", "low", "high"), [("year", 1790, 2021), ("syllables", 1, 12), ("depth", 0, 18)]
)
def test_regression_targets_are_in_range(task: str, low: float, high: float) -> None:
    for split in SPLITS:
        targets = TEXT.load(task, split).targets
        assert targets.min() >= low
        assert targets.max() <= high
        assert np.array_equal(targets, np.rint(targets))
        assert targets.std() > 0.5


def test_the_wordnet_tasks_share_no_synset() -> None:
    held = [
        {name for split in SPLITS for name in TEXT.load(task, split).documents}
        for task in ("supersense", "depth")
    ]
    assert not held[0] & held[1]


@pytest.mark.parametrize("task", TASKS)
def test_the_first_n_are_a_random_sample(task: str) -> None:
    few, every = TEXT.load(task, "train", 1000).targets, TEXT.load(task, "train").targets
    assert abs(few.mean() - every.mean()) < 5 * every.std() / np.sqrt(1000)


def test_limits_take_the_head_and_change_the_hash() -> None:
    every, few = TEXT.load("depth", "test"), TEXT.load("depth", "test", 10)
    assert few.texts == every.texts[:10]
    assert few.targets.tolist() == every.targets[:10].tolist()
    assert few.documents == every.documents[:10]
    assert TEXT.split_hash("depth", "test", 10) == few.fingerprint
    assert TEXT.split_hash("depth", "test", 10) != TEXT.split_hash("depth", "test")
    assert TEXT.split_hash("depth", "test", 1024) == TEXT.split_hash("depth", "test")


@pytest.mark.parametrize("limit", [0, -1, 513])
def test_a_limit_beyond_the_split_is_refused(limit: int) -> None:
    with pytest.raises(InputError, match=f"{limit} examples were asked for but it holds 512"):
        TEXT.load("depth", "calibration", limit)


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'syllables'"):
        TEXT.load("sylables", "train")
    with pytest.raises(InputError, match="Did you mean 'validation'"):
        TEXT.load("depth", "valid")


def test_missing_and_broken_data_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("tasks: {year: {kind: regression}}")
    with pytest.raises(InputError, match=f"{tmp_path}/year.jsonl: no such table"):
        open_suite(tmp_path)
    path = tmp_path / "year.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError, match=f"{path}: not a readable Parquet file"):
        open_suite(tmp_path).load("year", "test")


@pytest.mark.parametrize("task", TASKS)
def test_the_fingerprint_is_that_of_the_file(task: str) -> None:
    data = (DATA / f"{task}.parquet").read_bytes()
    assert TEXT.fingerprint(task) == hashlib.sha256(data).hexdigest()


def test_the_table_of_tasks_is_consistent() -> None:
    for name, task in TEXT.tasks.items():
        assert name == task.name
        assert (task.metric == "r2") == (task.kind == "regression") == (not task.classes)
        assert task.outputs == (len(task.classes) or 1)
        assert len(set(task.classes)) == len(task.classes)
        assert task.source
        assert task.licence


def test_the_data_are_small_and_their_licences_are_there() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.parquet")) < MOST_BYTES
    licences = {path.name: path.read_text() for path in (DATA / "LICENSES").iterdir()}
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licences["WordNet-3.0.txt"]
    assert "Carnegie Mellon University" in licences["CMUdict.txt"]
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licences["PSF-2.0.txt"]
    readme = (DATA / "README.md").read_text()
    for task in TEXT.tasks.values():
        assert f"`{task.name}`" in readme


def test_importing_suites_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "ray", "pyarrow", "numpy", "sklearn", "huggingface_hub"}
    # Only what the package itself has not loaded already is the suites' doing.
    code = (
        "import sys, icm_ray; before = set(sys.modules); import icm_ray.suites; "
        f"print({heavy} & (set(sys.modules) - before) or 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "nothing"


def test_suites_travel_between_processes() -> None:
    assert pickle.loads(pickle.dumps(TEXT)) == TEXT


def candidates(count: int) -> list[Candidate]:
    return [Candidate(f"text {i}", i % 2, f"doc {i // 3}", str(i % 5 == 0)) for i in range(count)]


def test_dividing_depends_on_nothing_but_the_candidates() -> None:
    rows = candidates(9000)
    first, second = divide("depth", rows), divide("depth", list(reversed(rows)))
    assert first == second
    table = to_table(TEXT.tasks["depth"], first)
    assert table.equals(to_table(TEXT.tasks["depth"], second))


def test_texts_that_occur_twice_are_left_out() -> None:
    rows = [*candidates(9000), Candidate("twice  Said", 0, "x"), Candidate("Twice said", 1, "y")]
    assert all("wice" not in row.text for split in divide("depth", rows).values() for row in split)


def test_too_few_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="are wanted"):
        divide("depth", candidates(300))
