"""The many suite: splits that share nothing over all tasks, and pairs that say what they claim."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest

from icm_ray.inputs import Pair
from icm_ray.suites import SPLITS, SUITES
from icm_ray.suites.many import pairs
from icm_ray.suites.many.sources import SIZES, split_of
from icm_ray.suites.text.build_extracts import divide, fold, to_table
from icm_ray.suites.text.sources import Candidate, Synset

MANY = SUITES["many"]
DATA = MANY.folder / "data"
TASKS = sorted(MANY.tasks)
PAIRS = {
    "continues",
    "earlier",
    "fits",
    "follows",
    "kind_of",
    "nearness",
    "opposites",
    "rhyme",
}
MOST_BYTES = 5_000_000


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, list]]:
    """Every task's columns; read whole, which is far quicker than through the suite."""
    return {name: pq.read_table(DATA / f"{name}.parquet").to_pydict() for name in TASKS}


def by_split(table: dict[str, list], column: str) -> dict[str, list]:
    found = {split: [] for split in SPLITS}
    for split, value in zip(table["split"], table[column], strict=True):
        found[split].append(value)
    return found


def test_twenty_tasks_of_which_eight_read_two_texts(rows: dict) -> None:
    assert len(TASKS) == 20
    assert {name for name, table in rows.items() if "text_pair" in table} == PAIRS
    assert {task.kind for task in MANY.tasks.values()} == {"classification", "regression"}
    assert isinstance(MANY.load("rhyme", "test", 1).texts[0], Pair)
    assert isinstance(MANY.load("stress", "test", 1).texts[0], str)


def test_no_text_is_in_two_splits(rows: dict) -> None:
    for table in rows.values():
        pairs_or_not = table.get("text_pair", [""] * len(table["text"]))
        asked = zip(table["text"], pairs_or_not, strict=True)
        folded = [fold("\n".join(texts)) for texts in asked]
        assert len(set(folded)) == len(folded) == sum(SIZES.values())
        assert Counter(table["split"]) == SIZES


def test_a_document_is_in_one_split_over_all_tasks(rows: dict) -> None:
    held: dict[str, str] = {}
    for table in rows.values():
        for split, documents in zip(table["split"], table["document"], strict=True):
            for document in documents.split("+"):
                assert held.setdefault(document, split) == split
    assert all(split_of(document) == split for document, split in held.items())


def test_documents_of_two_splits_are_no_pair() -> None:
    names = [f"document {i}" for i in range(20)]
    apart = next(f"{a}+{b}" for a, b in pairwise(names) if split_of(a) != split_of(b))
    with pytest.raises(ValueError, match="of one split is expected"):
        split_of(apart)


def test_every_class_is_in_every_split(rows: dict) -> None:
    for name, table in rows.items():
        classes = range(len(MANY.tasks[name].classes))
        for split, targets in by_split(table, "target").items() if classes else ():
            assert sorted(set(targets)) == list(classes), name
            most = max(Counter(targets).values())
            # Near-balanced: a constant guess is far below any model.
            assert most <= 1.5 * SIZES[split] / len(classes), name


@pytest.mark.parametrize(
    ("task", "low", "high"),
    [
        ("year", 1790, 2021),
        ("syllables", 1, 12),
        ("depth", 0, 18),
        ("day_of_year", 1, 366),
        ("nearness", 0, 1),
    ],
)
def test_regression_targets_are_in_range(rows: dict, task: str, low: float, high: float) -> None:
    for targets in by_split(rows[task], "target").values():
        assert min(targets) >= low
        assert max(targets) <= high
        assert np.std(targets) > 0.05 * (high - low)


def test_the_first_n_are_a_random_sample(rows: dict) -> None:
    for table in rows.values():
        every = np.array(by_split(table, "target")["train"])
        assert abs(every[:400].mean() - every.mean()) < 5 * every.std() / np.sqrt(400)


def nouns() -> dict[str, Synset]:
    """A family of nouns that are all of one split: a thing, animals, and kinds of animals."""
    names = iter(name for name in map(str, range(10_000)) if split_of(name) == "train")
    top, animal = next(names), next(names)
    made = {
        top: Synset(top, 0, ("thing",), "what there is", ()),
        animal: Synset(animal, 0, ("animal",), "a thing that moves", (("@", top),)),
    }
    for number in range(12):
        name = next(names)
        text = f"an animal of number {number}"
        made[name] = Synset(name, 0, (f"kind {number}",), text, (("@", animal),))
    return made


def test_a_kind_is_below_what_it_is_a_kind_of() -> None:
    known = nouns()
    parents = {s.lemma: {known[p].lemma for p in s.parents} for s in known.values()}
    found = Counter()
    for row in pairs.kind_candidates(known, MANY.tasks["kind_of"].classes):
        one, two = (text.partition(":")[0] for text in (row.text, row.pair))
        found[row.stratum] += 1
        assert (two in parents[one]) == (row.stratum == "below")
        assert (one in parents[two]) == (row.stratum == "above")
        assert bool(parents[one] & parents[two]) == (row.stratum == "beside")
    assert len(found) == 3


def test_a_definition_fits_its_own_noun_alone() -> None:
    known = nouns()
    own = {s.lemma: s.definition for s in known.values()}
    rows = list(pairs.fit_candidates(known, MANY.tasks["fits"].classes))
    assert {row.stratum for row in rows} == {"own", "other"}
    for row in rows:
        assert (own[row.text] == row.pair) == (row.stratum == "own")


def test_nouns_beside_the_root_are_near_to_everything_and_left_out(rows: dict) -> None:
    assert list(pairs.nearness_candidates(nouns())) == []
    assert max(rows["nearness"]["target"]) < 1


def test_the_earlier_date_is_the_earlier_one(rows: dict) -> None:
    for documents, target in zip(
        rows["earlier"]["document"], rows["earlier"]["target"], strict=True
    ):
        one, two = documents.split("+")
        assert (one > two) == bool(target)


def test_a_right_word_begins_with_its_stem_and_a_swapped_one_with_its_letter(rows: dict) -> None:
    table = rows["spelling"]
    for word, stem, target in zip(table["text"], table["document"], table["target"], strict=True):
        assert word[0] == stem[0]
        assert target or word.startswith(stem)


def test_the_data_are_small_and_their_licences_are_there() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.parquet")) < MOST_BYTES
    assert {path.stem for path in DATA.glob("*.parquet")} == set(TASKS)
    licences = {path.name: path.read_text() for path in (DATA / "LICENSES").iterdir()}
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licences["WordNet-3.0.txt"]
    assert "Carnegie Mellon University" in licences["CMUdict.txt"]
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licences["PSF-2.0.txt"]
    readme = (DATA / "README.md").read_text()
    for task in MANY.tasks.values():
        assert f"`{task.name}`" in readme


def test_pairs_that_share_one_text_are_two_examples() -> None:
    rows = [Candidate("same", i % 2, str(i), pair=f"other {i}") for i in range(4000)]
    found = divide("fits", rows, {"train": 100, "test": 20})
    assert [len(split) for split in found.values()] == [100, 20]
    assert divide("fits", reversed(rows), {"train": 100, "test": 20}) == found
    columns = to_table(MANY.tasks["fits"], {split: found.get(split, []) for split in SPLITS})
    assert set(columns["text_pair"].to_pylist()) <= {row.pair for row in rows}
