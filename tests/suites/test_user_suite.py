"""A user's suite: what is read of a folder, how rows are drawn, what each mistake is told in."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from icm_ray.errors import ICMRayError, InputError
from icm_ray.inputs import Pair, Prompt, Question, Turn
from icm_ray.suites import SPLITS, SUITES, checked_suite, find_suite

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(folder: Path, task: dict[str, Any], rows: list[Any], **suite: Any) -> Path:
    """Write a suite of one task, `mood`, and return its folder."""
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": {"mood": task}, **suite}))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "mood.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def labelled(count: int) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "answer": "good" if i % 3 else "bad"} for i in range(count)]


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(ICMRayError) as caught:
        checked_suite(folder)
    return list(caught.value.problems)


CLASSES = {"kind": "classification", "classes": ["bad", "good"]}


def test_a_suite_says_what_its_file_says_and_the_usual_of_the_rest(tmp_path: Path) -> None:
    write(tmp_path, {**CLASSES, "source": "a friend"}, labelled(40), base="org/model")
    suite = checked_suite(tmp_path)
    task = suite.tasks["mood"]
    assert (suite.base, suite.name) == ("org/model", tmp_path.name)
    assert (task.metric, task.max_tokens, task.labelled) == ("accuracy", 2048, True)
    test = suite.load("mood", "test")
    assert [float(text.split()[1]) % 3 > 0 for text in test.texts] == test.targets.tolist()


def test_rows_are_drawn_by_hash_whatever_their_order(tmp_path: Path) -> None:
    rows = labelled(100)
    one = checked_suite(write(tmp_path, CLASSES, rows))
    (tmp_path / "again").mkdir()
    other = checked_suite(write(tmp_path / "again", CLASSES, rows[::-1]))
    sizes = {split: one.count("mood", split) for split in SPLITS}
    assert sizes == {"train": 40, "calibration": 15, "validation": 15, "test": 30}
    for split in SPLITS:
        assert one.load("mood", split).texts == other.load("mood", split).texts
    (tmp_path / "seeded").mkdir()
    third = checked_suite(write(tmp_path / "seeded", CLASSES, rows, seed=1))
    assert third.load("mood", "test").texts != one.load("mood", "test").texts


def test_no_document_is_in_two_splits_and_equal_texts_stay_together(tmp_path: Path) -> None:
    rows = [{**row, "book": f"b{i % 20}"} for i, row in enumerate(labelled(200))]
    suite = checked_suite(write(tmp_path, {**CLASSES, "document": "book"}, rows))
    seen = [set(suite.load("mood", split).documents) for split in SPLITS]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 20
    twice = checked_suite(write(tmp_path, CLASSES, labelled(40) * 2))
    texts = [set(twice.load("mood", split).texts) for split in SPLITS]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 40


def test_a_larger_calibration_moves_no_row_that_is_tested(tmp_path: Path) -> None:
    parts = []
    for calibration in (8, 24):
        splits = {"calibration": calibration, "test": 20}
        suite = checked_suite(write(tmp_path, {**CLASSES, "splits": splits}, labelled(100)))
        assert suite.count("mood", "calibration") == calibration
        parts.append(suite.load("mood", "test").texts)
    assert parts[0] == parts[1]


def test_a_column_says_the_splits_and_what_it_lacks_is_drawn_from_its_train(tmp_path: Path) -> None:
    rows = [{**row, "split": "test" if i < 10 else "train"} for i, row in enumerate(labelled(60))]
    splits = {"test": 4, "validation": 5, "calibration": 6}
    suite = checked_suite(write(tmp_path, {**CLASSES, "splits": splits}, rows))
    assert suite.load("mood", "test").texts == tuple(f"text {i}" for i in range(4))
    sizes = {split: suite.count("mood", split) for split in SPLITS}
    assert sizes == {"train": 39, "calibration": 6, "validation": 5, "test": 4}
    texts = [set(suite.load("mood", split).texts) for split in SPLITS]
    assert sum(map(len, texts)) == len(set.union(*texts))
    rows = [{**row, "part": "dev" if i < 10 else "train"} for i, row in enumerate(labelled(60))]
    task = {**CLASSES, "split": "part", "splits": {"validation": "dev"}}
    assert checked_suite(write(tmp_path, task, rows)).count("mood", "validation") == 10


def test_a_table_may_hold_several_tasks_and_other_names(tmp_path: Path) -> None:
    rows = [{"q": f"{i} {{}}", "a": str(i), "area": "law" if i % 2 else "art"} for i in range(40)]
    task = {
        "kind": "generation",
        "prompt": "{{{area}}}: {q}",
        "answer": "a",
        "where": {"area": "law"},
        "expert": "lawyer",
    }
    suite = checked_suite(write(tmp_path, task, rows))
    train = suite.load("mood", "train")
    assert suite.experts_of(["lawyer"]) == {"mood": "lawyer"}
    assert suite.tasks["mood"].metric == "rouge_l"
    prompt = Prompt((Turn("user", f"{{law}}: {train.answers[0]} {{}}"),), room=128)
    assert train.texts[0] == prompt
    assert sum(suite.count("mood", split) for split in SPLITS) == 20


def test_conversations_end_in_their_answer(tmp_path: Path) -> None:
    rows = [{"talk": [{"role": "system", "content": str(i)}, *CHAT]} for i in range(12)]
    task = {"kind": "generation", "messages": "talk"}
    test = checked_suite(write(tmp_path, task, rows)).load("mood", "test")
    asked = test.texts[0]
    assert isinstance(asked, Prompt)
    assert (asked.chat, [turn.role for turn in asked.turns]) == (True, ["system", "user"])
    assert test.answers == ("hello",) * 3
    likely = checked_suite(write(tmp_path, {**task, "kind": "language_modelling"}, rows))
    asked = likely.load("mood", "test").texts[0]
    assert isinstance(asked, Prompt)
    assert asked.said == "hello"
    assert likely.tasks["mood"].metric == "token_likelihood"


def test_nobody_answered_so_fidelity_judges(tmp_path: Path) -> None:
    rows = [{"talk": [CHAT[0], {"role": "user", "content": str(i)}]} for i in range(12)]
    suite = checked_suite(write(tmp_path, {"kind": "generation", "messages": "talk"}, rows))
    assert (suite.tasks["mood"].metric, suite.tasks["mood"].labelled) == ("fidelity", False)
    assert suite.load("mood", "test").answers == ()
    texts = [{"text": str(i)} for i in range(12)]
    assert checked_suite(write(tmp_path, CLASSES, texts)).tasks["mood"].metric == "fidelity"
    assert "the rows have no answers" in str(
        problems_of(write(tmp_path, {**CLASSES, "metric": "accuracy"}, texts))
    )


def test_pairs_and_choices_are_read(tmp_path: Path) -> None:
    rows = [{"text": f"a{i}", "text_pair": "b", "target": i / 2} for i in range(12)]
    suite = checked_suite(write(tmp_path, {"kind": "regression", "metric": "rmse"}, rows))
    test = suite.load("mood", "test")
    assert test.texts[0] == Pair(f"a{int(test.targets[0] * 2)}", "b")
    rows = [{"q": str(i), "choices": ["x", "y", "z"], "answer": "z"} for i in range(12)]
    suite = checked_suite(write(tmp_path, {"kind": "multiple_choice", "prompt": "{q}"}, rows))
    test = suite.load("mood", "test")
    assert test.targets.tolist() == [2.0] * 3
    assert isinstance(test.texts[0], Prompt)
    assert test.texts[0].choices == ("x", "y", "z")


def test_parquet_holds_turns_and_lists_too(tmp_path: Path) -> None:
    write(tmp_path, {"kind": "generation", "messages": "talk"}, [])
    (tmp_path / "mood.jsonl").unlink()
    pq.write_table(pa.table({"talk": [CHAT] * 12}), tmp_path / "mood.parquet")
    assert problems_of(tmp_path) == [
        "suite.yaml: tasks.mood: splits: 1 documents but 4 or more are expected, one a split. Add "
        "rows, or say what each split is."
    ]
    talks = [[{**CHAT[0], "content": str(i)}, CHAT[1]] for i in range(12)]
    pq.write_table(pa.table({"talk": talks}), tmp_path / "mood.parquet")
    assert checked_suite(tmp_path).load("mood", "test").answers == ("hello",) * 3


def test_every_mistake_of_the_file_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, {"knd": "x", "kind": "classification"}, labelled(40))
    (problem,) = problems_of(tmp_path)
    assert "tasks.mood.knd: unknown key. Did you mean 'kind'?" in problem
    task = {"kind": "regression", "metric": "accuracy", "classes": ["a", "a"], "head": "names"}
    told = "\n".join(problems_of(write(tmp_path, task, labelled(40))))
    for part in ("mood.metric: 'accuracy' but a regression has one of r2, rmse", "a name twice"):
        assert part in told
    assert "head: names but a regression has none" in told


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"text": "txt"}, "text: no column 'txt'. Did you mean 'text'?"),
        ({"prompt": "Say it."}, "prompt: names no column"),
        ({"prompt": "{text.__class__}"}, "prompt: {text.__class__} but the plain name of a column"),
        ({"prompt": "{text!r}"}, "no attributes, no formats"),
        ({"prompt": "{texts}"}, "prompt: no column 'texts'. Did you mean 'text'?"),
        ({"where": {"area": 1}}, "where: no column 'area'"),
        ({"splits": {"test": 99}}, "splits.test: 99 rows are wanted but 40 are there"),
        ({"splits": {"test": "dev"}}, "splits.test: 'dev' but there is no split column"),
        ({"classes": ["bad", "fine"]}, "line 2: answer: 'good' is none of the 2 classes."),
    ],
)
def test_each_mistake_about_the_data_is_named(tmp_path: Path, task: Any, said: str) -> None:
    told = problems_of(write(tmp_path, {**CLASSES, **task}, labelled(40)))
    assert any(said in line for line in told), told


def test_wrong_values_are_told_with_line_and_column(tmp_path: Path) -> None:
    rows: list[Any] = labelled(12)
    rows[3], rows[4], rows[5] = {"text": " ", "answer": 0}, {"text": "x", "answer": 7}, {"text": 3}
    told = problems_of(write(tmp_path, CLASSES, rows))
    path = tmp_path / "mood.jsonl"
    assert told == [
        f"{path}: line 4: text: empty but words are expected. Mend or drop the line.",
        f"{path}: line 5: answer: 7 but 0 to 1 is expected: an index of classes.",
        f"{path}: line 6: text: 3 but a text is expected. Mend or drop the line.",
    ]
    rows = [*labelled(12), {"text": "and this?"}]
    (problem,) = problems_of(write(tmp_path, CLASSES, rows))
    assert "line 13: no answer but other rows have one (1 of 13 lack it)" in problem
    (problem,) = problems_of(write(tmp_path, {"kind": "classification"}, labelled(12)))
    assert "answers are names (bad, good) but nobody says in which order" in problem


def test_an_answer_by_another_name_is_no_silent_loss(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(12)]
    (problem,) = problems_of(write(tmp_path, CLASSES, rows))
    assert "answer: no column 'answer' or 'target' but there is 'label'" in problem


def test_the_base_beside_the_suite_names_the_classes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    labels = {"id2label": {"0": "bad", "1": "good"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(labels))
    suite = checked_suite(write(tmp_path, {"kind": "classification"}, labelled(40), base="model"))
    assert suite.base == str(tmp_path / "model")
    assert suite.tasks["mood"].classes == ("bad", "good")


def test_a_suite_is_found_by_name_or_folder_and_read_again_when_it_changes(tmp_path: Path) -> None:
    assert find_suite("text") is SUITES["text"]
    write(tmp_path, CLASSES, labelled(40))
    suite = find_suite(str(tmp_path))
    assert find_suite(str(tmp_path)) is suite
    before = suite.fingerprint("mood")
    write(tmp_path, {**CLASSES, "max_tokens": 8}, labelled(40))
    assert find_suite(str(tmp_path)).fingerprint("mood") != before
    with pytest.raises(ICMRayError, match=r"a folder with suite.yaml, or one of text, lm"):
        find_suite("txet")


@pytest.mark.slow
def test_the_suites_that_come_along_pass_the_same_look(tmp_path: Path) -> None:
    suite = SUITES["generation"]
    again = checked_suite(suite.folder)
    assert again.tasks == suite.tasks
    asked = again.load("lemma", "test", 1).texts[0]
    assert isinstance(asked, Question)
    assert asked.room == 8


def test_a_name_that_leaves_the_folder_is_no_image(tmp_path: Path) -> None:
    rows = [{"image": "../secret.png", "answer": 0} for _ in range(4)]
    task = {**CLASSES, "splits": {"train": 0, "calibration": 0, "validation": 0, "test": 4}}
    told = problems_of(write(tmp_path, task, rows))
    assert len(told) == 4
    assert "line 1: image: '../secret.png': no file in the table's folder" in told[0]


def test_a_local_copy_of_a_hub_data_set_is_read_by_its_splits(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("ICM_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "copy").mkdir()
    for split, count in (("train", 30), ("test", 8)):
        rows = labelled(count)
        table = pa.table({name: [row[name] for row in rows] for name in ("text", "answer")})
        pq.write_table(table, tmp_path / "copy" / f"{split}-00000-of-00001.parquet")
    write(tmp_path, {**CLASSES, "data": {"hub": "copy"}}, [])
    suite = checked_suite(tmp_path)
    assert suite.load("mood", "test").texts == tuple(f"text {i}" for i in range(8))
    assert suite.count("mood", "calibration") == 4
    before = suite.fingerprint("mood")
    (tmp_path / "copy" / "README.md").write_text("another one")
    assert checked_suite(tmp_path).fingerprint("mood") != before
    (problem,) = problems_of(write(tmp_path, {**CLASSES, "data": {"hub": "org/name"}}, []))
    assert "tasks.mood.data.revision: missing. Name a commit" in problem


def test_a_suite_may_be_at_an_address(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ICM_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", CLASSES, labelled(40))
    suite = find_suite((tmp_path / "mine").as_uri())
    assert suite.name == "mine"
    assert suite.count("mood", "test") == 12
    with pytest.raises(InputError, match="a file:// address that cannot be read"):
        find_suite((tmp_path / "nowhere").as_uri())


def test_images_of_any_size_are_kept_apart_and_must_open(tmp_path: Path) -> None:
    from PIL import Image

    rows = []
    for number, side in enumerate((8, 8, 9, 8)):
        Image.new("RGB", (side, 8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "answer": number % 2, "split": "test"})
    suite = checked_suite(write(tmp_path, CLASSES, rows))
    assert suite.load("mood", "test", 2).images.shape == (2, 8, 8, 3)
    every = suite.load("mood", "test")
    assert [image.shape for image in every.images] == [(8, 8, 3), (8, 8, 3), (8, 9, 3), (8, 8, 3)]
    assert every.fingerprint != every.first(3).fingerprint
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="line 4: no readable image"):
        checked_suite(tmp_path).load("mood", "test")
    # Where each patch has a value, all images have as many.
    dense = [{**row, "answer": [0, 1]} for row in rows]
    suite = checked_suite(write(tmp_path, {**CLASSES, "kind": "dense_classification"}, dense))
    with pytest.raises(InputError) as caught:
        suite.load("mood", "test")
    first, second = caught.value.problems
    assert "line 3: an image of 9 x 8 but 8 x 8 as in the first row" in first
    assert "line 4: no readable image" in second
    task = {**CLASSES, "image": "image", "prompt": "{answer}"}
    assert "prompt: no place for 'image'" in str(problems_of(write(tmp_path, task, rows)))
