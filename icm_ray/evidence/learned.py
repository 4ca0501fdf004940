"""What was learned, as named tensors: in memory, on disk, and back to a merge's factors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.evidence.tensors import (
    TENSORS,
    read_evidence,
    write_evidence,
)

KIND = "learned_merge"


@dataclass(frozen=True)
class LearnedMerge:
    """A learned merge of K adapters.

    Attributes:
        tensors: `<module>.<kind>` or `<module>.<kind>.<task>`; see `rebuild`.
        tasks: All tasks, sorted: the rows of coefficients.
        adapters: Fingerprint of each task's adapter.
        origin: How it was learned, as plain data: parameters, objective, start, recipe.
        report: What happened: losses before and after, their history, warnings, modules that got
            no gradient.
        method: The method it was learned with; empty where nobody says.
    """

    tensors: Mapping[str, Tensor]
    tasks: tuple[str, ...]
    adapters: Mapping[str, str]
    origin: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""


def save_learned(
    learned: LearnedMerge, folder: Path, origin: Mapping[str, Any] | None = None
) -> None:
    """Write a learned merge to a new folder, all or nothing, as evidence that methods read.

    Args:
        learned: What to write.
        folder: The output.
        origin: What it was made from, such as the run's key; stored in the manifest.
    """
    described = {
        "tasks": list(learned.tasks),
        "origin": dict(learned.origin),
        "report": dict(learned.report),
        **({"method": learned.method} if learned.method else {}),
    }
    write_evidence(
        folder,
        KIND,
        learned.tensors,
        adapters=learned.adapters,
        described=described,
        origin=origin,
    )


def load_learned(folder: Path) -> LearnedMerge:
    """Read a learned merge back.

    Raises:
        InputError: the folder is not intact, or holds another kind of evidence.
    """
    evidence = read_evidence(folder)
    if evidence.kind != KIND:
        raise InputError(
            f"{folder}: {evidence.kind} but {KIND} is expected. Learn it with jobs.learn."
        )
    described = evidence.described
    return LearnedMerge(
        load_file(folder / TENSORS),
        tuple(described["tasks"]),
        evidence.adapters,
        described["origin"],
        described["report"],
        described.get("method", ""),
    )
