"""Tensors in several files with an index that says which one is where: adapters and bases alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from icm_ray.adapters.formats.view import Stored
from icm_ray.adapters.header import MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, read_header
from icm_ray.adapters.policy import short
from icm_ray.adapters.raw_files import read_table
from icm_ray.errors import InputError

INDEX_ENDING = ".safetensors.index.json"
T = TypeVar("T")


def attempt(read: Callable[[], T], problems: list[str]) -> T | None:
    """Return what `read` gives, or None after adding its problems to the others."""
    try:
        return read()
    except InputError as error:
        problems += error.problems
        return None


def read_shards(index: Path) -> tuple[dict[str, TensorInfo], dict[str, Stored]]:
    """Return every tensor's header and place, after comparing the index with all of its shards.

    Raises:
        InputError: a tensor or shard is missing, unlisted or outside the index's folder.
    """
    places = _places(index, read_table(index, MAX_HEADER_BYTES).get("weight_map"))
    stem = index.name.removesuffix(INDEX_ENDING)
    on_disk = {path.name for path in index.parent.glob(f"{stem}-*.safetensors")}
    problems = [
        f"{index.parent / name}: a shard that {index.name} does not list. Save or download again."
        for name in sorted(on_disk - set(places.values()))
    ]
    header: dict[str, TensorInfo] = {}
    stored: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        own = attempt(lambda shard=shard: read_header(shard), problems) or {}
        problems += [
            f"{shard}: {key}: not of this shard by {index.name}. Save or download again."
            for key in own
            if places.get(key) != name
        ]
        header |= own
        stored |= {key: Stored(shard, key) for key in own}
    if not problems:
        problems += [
            f"{index}: {key}: not in shard {places[key]} but expected. Save or download again."
            for key in places.keys() - header.keys()
        ]
    if problems:
        raise InputError(sorted(problems))
    return header, stored


def _places(index: Path, table: Any) -> dict[str, str]:
    """Return the shard of every tensor, if each is a file name of the index's own folder."""
    names = table.values() if isinstance(table, dict) else ()
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise InputError(
            f"{index}: weight_map: {short(table)} but the shard of every tensor, a file beside "
            "the index, is expected. Save or download again."
        )
    if len(names) > MAX_TENSORS:
        raise InputError(
            f"{index}: {len(names)} tensors but at most {MAX_TENSORS} are expected. Split it."
        )
    return table
