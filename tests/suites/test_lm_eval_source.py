"""Tasks of lm-eval as a suite's: our own YAML over a local file, and no network."""

import json
from pathlib import Path

import pytest
import yaml

from icm_ray.config import ALLOW_CODE_VARIABLE
from icm_ray.errors import InputError, RecipeError
from icm_ray.suites import checked_suite

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

CHOOSES = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{right}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SAYS = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{question}}",
    "doc_to_target": "{{options[right]}}",
    "generation_kwargs": {"until": ["\n"]},
    "metric_list": [{"metric": "exact_match"}],
}
ROLLS = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ALLOW_CODE_VARIABLE, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    for split, count in (("train", 20), ("test", 6)):
        rows = [
            {"question": f"{split} {i}?", "options": [f"a{i}", f"b{i}"], "right": i % 2}
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write(folder: Path, task: dict, splits: tuple[str, ...] = ("train", "test"), **own) -> Path:
    files = {split: str(folder / f"{split}.jsonl") for split in splits}
    plain = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    plain |= {f"{'training' if s == 'train' else s}_split": s for s in splits}
    (folder / "mine.yaml").write_text(yaml.safe_dump({**plain, **task}))
    mine = {"kind": "multiple_choice", "data": {"lm_eval": "mine.yaml"}, **own}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": {"mine": mine}}))
    return folder


def test_a_multiple_choice_is_asked_in_its_words(folder) -> None:
    suite = checked_suite(write(folder, CHOOSES))
    test = suite.load("mine", "test")
    assert len(test) == 6
    asked = dict(zip((str(t.turns[0].content) for t in test.texts), test.texts, strict=True))
    assert asked["Question: test 3?\nAnswer:"].choices == ("a3", "b3")
    right = {str(t.turns[0].content): x for t, x in zip(test.texts, test.targets, strict=True)}
    assert [right[f"Question: test {i}?\nAnswer:"] for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert suite.tasks["mine"].metric == "accuracy"
    assert suite.count("mine", "train") + suite.count("mine", "calibration") <= 20
    before = suite.fingerprint("mine")
    other = checked_suite(write(folder, {**CHOOSES, "doc_to_text": "{{question}}"}))
    assert other.fingerprint("mine") != before


def test_answers_and_texts(folder) -> None:
    suite = checked_suite(write(folder, SAYS, kind="generation"))
    test = suite.load("mine", "test")
    assert set(test.answers) == {"a0", "b1", "a2", "b3", "a4", "b5"}
    assert all(str(text).startswith("Q: test ") for text in test.texts)
    suite = checked_suite(write(folder, ROLLS, splits=("test",), kind="language_modelling"))
    texts = {text for split in ("train", "test") for text in suite.load("mine", split).texts}
    assert all(str(text).startswith("test ") for text in texts)


def test_a_file_is_code_that_somebody_must_allow(folder, monkeypatch) -> None:
    monkeypatch.delenv(ALLOW_CODE_VARIABLE)
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\ndef words(doc):\n    return 'x'\n")
    write(folder, CHOOSES)
    file = folder / "mine.yaml"
    file.write_text(file.read_text() + "process_docs: !function own.words\n")
    with pytest.raises(RecipeError, match=r"set allow_code: true in the recipe"):
        checked_suite(folder)
    assert not ran.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mine", "./mine.YAML", "deep/mine"])
def test_what_is_no_name_is_no_way_around(folder, monkeypatch, name) -> None:
    monkeypatch.delenv(ALLOW_CODE_VARIABLE)
    monkeypatch.chdir(folder)
    write(folder, CHOOSES, data={"lm_eval": name})
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\ndef words(doc):\n    return 'x'\n")
    (folder / "deep").mkdir()
    text = (folder / "mine.yaml").read_text() + "process_docs: !function own.words\n"
    for file in ("mine", "mine.YAML", "deep/mine"):
        (folder / file).write_text(text)
    (folder / "deep" / "own.py").write_text((folder / "own.py").read_text())
    for named in (name, str(folder / name)):
        write(folder, CHOOSES, data={"lm_eval": named})
        with pytest.raises(InputError, match="no task of that name"):
            checked_suite(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("task", "own", "words"),
    [
        (CHOOSES, {"kind": "generation"}, "Set kind: multiple_choice"),
        ({**CHOOSES, "doc_to_text": "{{questoin.x}}"}, {}, "'questoin' is undefined"),
        ({**CHOOSES, "doc_to_target": "{{options}}"}, {}, "several prompts or answers"),
        ({**CHOOSES, "output_type": "loglikelihood"}, {}, "Write its rows into a table"),
        (CHOOSES, {"data": {"lm_eval": "other.yaml"}}, "no such file"),
        (CHOOSES, {"data": {"lm_eval": "no_such_task_at_all"}}, "no task of that name"),
    ],
)
def test_what_cannot_be_used_is_said(folder, task, own, words) -> None:
    with pytest.raises(InputError, match=words):
        checked_suite(write(folder, task, **own))


def test_without_lm_eval_it_is_said_what_to_install(folder, monkeypatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(InputError, match=r"icm-ray\[lm_eval\]"):
        checked_suite(write(folder, CHOOSES))
