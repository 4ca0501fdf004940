"""Experts on disk: an adapter, its frozen head if it has one, and what they scored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.errors import InputError
from icm_ray.evaluation.heads import Head
from icm_ray.files import read_json

ADAPTER, HEAD, METRICS = "adapter", "head.safetensors", "metrics.json"
TRAJECTORIES = "trajectories"


@dataclass(frozen=True)
class Expert:
    """One expert's folder.

    Attributes:
        task: The task's name.
        folder: Holds `adapter/`, `metrics.json` and, where the task has one, `head.safetensors`.
        path: The adapter of an expert that was trained elsewhere; None: `adapter/` of the folder.
    """

    task: str
    folder: Path
    path: Path | None = None

    @property
    def adapter(self) -> Path:
        """The PEFT folder."""
        return self.path or self.folder / ADAPTER

    def head(self) -> Head | None:
        """Read the frozen head; None if the base answers by itself."""
        path = self.folder / HEAD
        return Head.load(path) if path.is_file() else None

    def metrics(self) -> dict[str, Any]:
        """Read what training recorded."""
        return read_json(self.folder / METRICS)


def find_experts(folder: Path) -> Mapping[str, Expert]:
    """Return the experts of one set by task name, sorted.

    Raises:
        InputError: the folder holds none.
    """
    found = sorted(folder.glob(f"*/{METRICS}"))
    if not found:
        raise InputError(f"{folder}: no expert in it. Train some with jobs.finetune.")
    return {metrics.parent.name: Expert(metrics.parent.name, metrics.parent) for metrics in found}


def ready_experts(adapters: Iterable[tuple[str, Path]]) -> dict[str, Expert]:
    """Return adapters by name as the experts of the tasks they are called after, sorted.

    Their heads are looked for in the adapter's folder, and beside an `adapter/` as jobs.finetune
    writes it.
    """
    return {
        name: Expert(name, path.parent if path.name == ADAPTER else path, path)
        for name, path in sorted(adapters)
    }
