"""What the trainings of a Fusion-VAE share, whoever runs them: checkpoints, and their identity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile
from icm_ray.config import FusionSpec
from icm_ray.errors import InputError
from icm_ray.files import sha256_of_file
from icm_ray.learning.tasks import LearnerData

Trajectories = Mapping[str, Path]
"""By task: the folder of its checkpoints; empty for the adapters alone."""


def trajectories_in(folder: str | None, files: Sequence[AdapterFile]) -> dict[str, Path]:
    """Return the folders of the adapters' checkpoints in the folder a recipe names, if any."""
    return {file.name: Path(folder) / file.name for file in files} if folder else {}


def hashes_of(trajectories: Trajectories) -> list[str]:
    """Return the sha256 of every file of checkpoints.

    Raises:
        InputError: a task has none.
    """
    hashes = []
    for task, folder in trajectories.items():
        paths = sorted(folder.glob("*.parquet"))
        if not paths:
            raise InputError(f"{folder}: no trajectory of {task} there. Train with jobs.finetune.")
        hashes += [sha256_of_file(path) for path in paths]
    return hashes


def content_of(
    spec: FusionSpec,
    files: Sequence[AdapterFile],
    trajectories: Trajectories,
    data: LearnerData,
) -> dict[str, Any]:
    """Return, as plain data, what decides about a trained model wherever it is trained."""
    return {
        "fusion": spec.model_dump(),
        "adapters": {file.name: file.fingerprint for file in files},
        "trajectories": hashes_of(trajectories),
        "data": data.key,
    }
