"""Heads re-aligned in parallel: one actor a merge; each merge's heads are kept by content."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import ray

from icm_ray.distributed.scores import ScoreItem
from icm_ray.distributed.session import Pool
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.scoring import BATCH, TaskData
from icm_ray.files import is_done, sha256_of, whole_folder

VERSION = 1
SUFFIX = ".safetensors"


def heads_on_ray(
    pool: Pool,
    items: Sequence[ScoreItem],
    data: Mapping[str, TaskData],
    folder: Path,
    batch: int = BATCH,
) -> dict[str, dict[str, Head]]:
    """Return the re-aligned heads of every item by label and task; see `evaluation.realigned`.

    Args:
        pool: Actors that hold the base.
        items: Merges, or the base; of their tasks those in `data` count.
        data: Unlabelled inputs with heads and experts.
        folder: Heads go to `<folder>/<label>/<task>.safetensors`, which a suite's `head:` takes.
        batch: Examples a forward.
    """
    places = {item.label: folder / item.label for item in items}
    keys = {i.label: sha256_of([VERSION, i.key(pool.session.key, data, batch)]) for i in items}
    missing = {i.label: i for i in items if not is_done(places[i.label], keys[i.label])}
    shared = ray.put(dict(data)) if missing else None

    def keep(label: str, heads: Mapping[str, Head]) -> None:
        with whole_folder(places[label], info={"key": keys[label]}) as place:
            for task, head in heads.items():
                head.save(place / f"{task}{SUFFIX}")

    arguments = {label: (item.source, shared, batch) for label, item in missing.items()}
    pool.map("heads", arguments, label=f"re-align heads {folder.name}", done=keep)
    return {label: read_heads(place) for label, place in places.items()}


def read_heads(folder: Path) -> dict[str, Head]:
    """Return the heads in a folder by task."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    return {file.name.removesuffix(SUFFIX): Head.load(file) for file in files}
