"""The language-modelling suite as it is committed."""

import pytest

from icm_ray.suites import SPLITS, SUITES
from icm_ray.suites.lm.build_extracts import SIZES, windows

LM = SUITES["lm"]


@pytest.mark.parametrize("task", LM.tasks)
def test_splits_are_whole_and_share_no_document(task):
    parts = {split: LM.load(task, split) for split in SPLITS}
    assert {split: len(examples) for split, examples in parts.items()} == SIZES
    seen = [set(examples.documents) for examples in parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))
    texts = [text for examples in parts.values() for text in examples.texts]
    assert len(set(texts)) == len(texts)
    assert all(500 < len(text) <= 900 for text in texts)


def test_no_address_is_left():
    texts = [text for split in SPLITS for text in LM.load("email", split).texts]
    found = {word for text in texts for word in text.split() if "@" in word and ".com" in word}
    assert not found


def test_windows_do_not_overlap_and_end_between_words():
    text = " ".join(f"word{number}" for number in range(400))
    made = list(windows(iter([("document", text)]), 200))
    assert len(made) > 10
    assert "".join(window.text for window in made) == text[: sum(len(w.text) for w in made)]
    assert all(160 <= len(window.text) <= 200 for window in made)
