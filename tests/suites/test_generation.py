"""The generation suite as it is committed, and what its builder makes of lines of its sources."""

import datetime
import re

import pytest

from icm_ray.suites import SPLITS, SUITES
from icm_ray.suites.generation.build_extracts import (
    PHONES,
    SIZES,
    WORDINGS,
    lemmas,
    pronunciations,
    worded,
)

GENERATION = SUITES["generation"]
DATA = GENERATION.folder / "data"
FORMS = {
    "pronunciation": (r"Pronounce: [a-z]{4,}\n", r"[A-Z]{1,2}( [A-Z]{1,2})*"),
    "definition": (r"Define: [a-z]+( [a-z]+)?\n", r"[a-z ,'-]+"),
    "lemma": (r"Base form: [a-z]{4,}\n", r"\S+"),
    "date": (r"ISO date: .*\d{4}\n", r"\d{4}-\d\d-\d\d"),
}
MOST_BYTES = 400_000


@pytest.mark.parametrize("task", GENERATION.tasks)
def test_splits_are_whole_and_share_no_document(task):
    parts = {split: GENERATION.load(task, split) for split in SPLITS}
    assert {split: len(examples) for split, examples in parts.items()} == SIZES
    seen = [set(examples.documents) for examples in parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))
    texts = [text for examples in parts.values() for text in examples.texts]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("task", GENERATION.tasks)
def test_prompts_and_answers_have_their_form(task):
    prompt, answer = FORMS[task]
    for split in SPLITS:
        examples = GENERATION.load(task, split)
        assert len(examples.answers) == len(examples)
        assert all(re.fullmatch(prompt, text) for text in examples.texts)
        assert all(re.fullmatch(answer, text) for text in examples.answers)


def test_no_single_answer_is_worth_much():
    for task in GENERATION.tasks:
        answers = GENERATION.load(task, "test").answers
        assert max(map(answers.count, answers)) <= 3


def test_days_are_worded_as_people_do():
    day = datetime.date(1912, 6, 23)
    assert [worded(day, wording) for wording in WORDINGS] == [
        "23 June 1912",
        "June 23, 1912",
        "Sunday, 23 Jun 1912",
        "the 23rd of June, 1912",
        "Jun 23rd, 1912",
    ]
    ends = {worded(day.replace(day=n), "{ordinal}") for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 30)}
    assert ends == {"1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "30th"}


def test_the_builder_reads_its_sources(tmp_path):
    words = tmp_path / "dict.txt"
    words.write_text("SPARKS  S P AA1 R K S\nSPARKS(1)  S P AA0\nTOE  T OW1\nSPARK'S  S P AA1\n")
    (made,) = pronunciations(words)
    assert (made.text, made.answer) == ("Pronounce: sparks\n", "S P AA R K S")
    assert len(made.answer.split()) in PHONES
    for part, lines in {"noun": "oxen ox\naxes ax axis\n", "verb": "went go\n", "adj": ""}.items():
        (tmp_path / f"{part}.exc").write_text(lines)
    assert [(row.text, row.answer) for row in lemmas(tmp_path)] == [
        ("Base form: oxen\n", "ox"),
        ("Base form: went\n", "go"),
    ]


def test_the_data_are_small_and_their_licences_are_there():
    folder = GENERATION.folder / "data"
    assert sum(path.stat().st_size for path in folder.glob("*.parquet")) < MOST_BYTES
    assert "Carnegie Mellon" in (folder / "LICENSES/CMUdict.txt").read_text()
    assert "Princeton University" in (folder / "LICENSES/WordNet-3.0.txt").read_text()
    readme = (folder / "README.md").read_text()
    assert all(f"`{task}`" in readme for task in GENERATION.tasks)
