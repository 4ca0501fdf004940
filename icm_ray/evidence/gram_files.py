"""Gram statistics on disk: parts that workers write, joined with one Gram in memory at a time.

.<output>.gathering-<key>/<task>/0000/    what one pass of a task found room for
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from icm_ray.errors import ResourceError
from icm_ray.evidence.overlap import input_overlap
from icm_ray.evidence.tensors import (
    GRAM_FORMAT,
    GRAMS,
    Evidence,
    base_of,
    new_evidence,
    read_evidence,
)
from icm_ray.linalg.gram import GRAM_KINDS
from icm_ray.linalg.gram_sums import kept_entries

SMALLER = (512, 256, 128, 64, 32, 0)
"""Directions that are proposed where the wholes find no room."""


@dataclass(frozen=True)
class GramOrder:
    """What is gathered of every task.

    Attributes:
        modules: Of these layers.
        directions: Of each Gram beside its diagonal; None: wholes.
        scratch: Folder of the parts, which every worker sees.
        key: Identifies the result that the parts belong to.
    """

    modules: Sequence[str]
    directions: int | None
    scratch: Path
    key: str

    def parts(self, task: str) -> list[Path]:
        """Return a task's parts."""
        return sorted((self.scratch / task).glob("[0-9]*"))


def stored_bytes(widths: Iterable[int], directions: int | None) -> int:
    """Return what one task's Gram statistics take at most.

    Args:
        widths: Of the modules' inputs; modules that read one tensor share its Gram.
        directions: Of each Gram beside its diagonal; None: wholes.
    """
    return 4 * sum(kept_entries(d_in, directions) for d_in in widths)


def room_lines(folder: Path, widths: Sequence[int], tasks: int, asked: int | None) -> list[str]:
    """Return a line if the disk has less room than Gram statistics and their parts may take.

    Args:
        folder: The output.
        widths: Of the modules' inputs.
        tasks: How many.
        asked: Directions of each Gram beside its diagonal; None: wholes.
    """
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    needs = {n: 2 * tasks * stored_bytes(widths, n) for n in (asked, *SMALLER)}
    if needs[asked] <= free:
        return []
    best = next((n for n in SMALLER if needs[n] <= free), 0)
    form = f"low_rank:{best}" if best else "diagonal"
    return [
        f"{folder}: Gram statistics and their parts may take {needs[asked] / 1e9:.1f} GB but "
        f"{free / 1e9:.1f} GB are free. Make room, or set resources.grams={form}, which takes "
        f"{needs[best] / 1e9:.1f} GB."
    ]


def join_parts(
    order: GramOrder, tasks: Iterable[str], folder: Path, origin: Mapping[str, Any]
) -> None:
    """Write all tasks' parts as one folder of Gram statistics.

    Args:
        order: What was gathered.
        tasks: All of them.
        folder: The output.
        origin: What it was made from; stored in the manifest.

    Raises:
        ResourceError: a task's parts are not to be seen from here.
    """
    parts = {task: order.parts(task) for task in tasks}
    if missing := [task for task, own in parts.items() if not own]:
        raise ResourceError(
            f"{order.scratch}: no Gram statistics of {', '.join(missing)}, which were gathered on "
            "another node. Choose an output in a folder that every node sees."
        )
    _join([(read_evidence(p), task) for task, own in parts.items() for p in own], folder, origin)


def join_grams(folders: Sequence[Path], folder: Path, tasks: Sequence[str]) -> None:
    """Write several groups' Gram statistics as one; of a task in several, the last group's count.

    Args:
        folders: Gram statistics.
        folder: The output.
        tasks: Whose tensors are taken over.
    """
    sources = [read_evidence(source) for source in folders]
    owner = {task: one for one in sources for task in one.adapters if task in tasks}
    bases = {base_of(source) for source in folders}
    origin = {"base": bases.pop()} if len(bases) == 1 else {}
    _join([(one, task) for task, one in owner.items()], folder, origin)


def _join(shares: Sequence[tuple[Evidence, str]], folder: Path, origin: Mapping[str, Any]) -> None:
    """Write what some evidence holds of one task each."""
    files: dict[str, Path] = {}
    about: dict[str, dict[str, Any]] = {"inputs": {}, "rows": {}}
    adapters: dict[str, str] = {}
    shared: dict[str, dict[str, str]] = {}
    for one, task in shares:
        assert one.file is not None, "read from a folder"
        ends = tuple(f".{kind}.{task}" for kind in GRAM_KINDS)
        files |= {name: one.file for name in one.names if name.endswith(ends)}
        adapters[task] = one.adapters[task]
        shared.setdefault(task, {}).update(one.shared.get(task, {}))
        if task in one.described.get("rows", {}):
            about["rows"].setdefault(task, {}).update(one.described["rows"][task])
            about["inputs"][task] = one.described["inputs"][task]
    described: dict[str, Any] = {"format": GRAM_FORMAT, **about}
    with new_evidence(
        folder, GRAMS, adapters=adapters, shared=shared, described=described, origin=origin
    ) as place:
        _save_in_turn(place, files)
        joined = Evidence(GRAMS, frozenset(files), "", adapters, shared, place)
        described["overlap"] = input_overlap(joined, list(adapters))


def _save_in_turn(place: Path, files: Mapping[str, Path]) -> None:
    """Write tensors of several safetensors files to one, float32, one in memory at a time."""
    header, end = {}, 0
    for name, file in sorted(files.items()):
        with safe_open(file, framework="pt") as handle:
            shape = handle.get_slice(name).get_shape()
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with place.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, file in sorted(files.items()):
            with safe_open(file, framework="pt") as handle:
                out.write(handle.get_tensor(name).float().contiguous().numpy().data)
