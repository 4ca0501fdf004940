"""PEFT's own folder, whole or in shards with an index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from icm_ray.adapters.formats.view import Stored, View
from icm_ray.adapters.header import MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, read_header
from icm_ray.adapters.policy import CONFIG_FILE, read_table, short
from icm_ray.errors import InputError

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
T = TypeVar("T")


def read_folder(folder: Path) -> View:
    """Read config and header of a PEFT folder; a problem of one does not hide the other's."""
    problems: list[str] = []
    file = folder / WEIGHTS_FILE
    return View(
        format="PEFT",
        file=file,
        config=_attempt(lambda: read_table(folder / CONFIG_FILE), problems),
        header=_attempt(lambda: read_header(file), problems),
        config_file=folder / CONFIG_FILE,
        problems=tuple(problems),
    )


def read_sharded(folder: Path) -> View:
    """Read config, index and every shard's header of a PEFT folder."""
    problems: list[str] = []
    index = folder / INDEX_FILE
    config = _attempt(lambda: read_table(folder / CONFIG_FILE), problems)
    header, stored = _attempt(lambda: _read_index(index), problems) or (None, {})
    return View(
        format="PEFT, sharded",
        file=index,
        config=config,
        header=header,
        stored=stored,
        config_file=folder / CONFIG_FILE,
        problems=tuple(problems),
    )


def _attempt(read: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return read()
    except InputError as error:
        problems += error.problems
        return None


def _read_index(index: Path) -> tuple[dict[str, TensorInfo], dict[str, Stored]]:
    places = _places(index, read_table(index, MAX_HEADER_BYTES).get("weight_map"))
    on_disk = {path.name for path in index.parent.glob("adapter_model-*.safetensors")}
    problems = [
        f"{index.parent / name}: a shard that {INDEX_FILE} does not list. Save the adapter again."
        for name in sorted(on_disk - set(places.values()))
    ]
    header: dict[str, TensorInfo] = {}
    stored: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        own = _attempt(lambda shard=shard: read_header(shard), problems) or {}
        problems += [
            f"{shard}: {key}: not of this shard by {INDEX_FILE}. Save the adapter again."
            for key in own
            if places.get(key) != name
        ]
        header |= own
        stored |= {key: Stored(shard, key) for key in own}
    if not problems:
        problems += [
            f"{index}: {key}: not in shard {places[key]} but expected. Save the adapter again."
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
            "the index, is expected. Save the adapter again."
        )
    if len(names) > MAX_TENSORS:
        raise InputError(
            f"{index}: {len(names)} tensors but at most {MAX_TENSORS} are expected. "
            "Split the adapter."
        )
    return table
