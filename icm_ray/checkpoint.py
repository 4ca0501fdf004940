"""State that a killed run continues from: one safetensors file, replaced whole, with a checksum.

A run keeps it in a scratch folder beside its output, named by what it depends on, so that another
recipe never finds it. What is damaged is left aside, and its steps are simply made again.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from icm_ray.errors import InputError

FORMAT = "1"
"""Of the file. Another one is refused by its number; the checksum is made the same way in all."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW and Adam remember of a parameter."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state.

    Attributes:
        path: The file; its folder exists.
        key: Identifies the run; only a run with the same key resumes.
    """

    path: Path
    key: str = ""

    def save(
        self, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, history: Any
    ) -> None:
        """Write parameters, their moments and the history, replacing an earlier state whole.

        A state with a value that is no number is not written: the last good one stays.

        Args:
            leaves: Parameters by name; those that never had a gradient have no moments.
            optimizer: Adam or AdamW over the leaves.
            history: What happened so far, as plain data; its length is the number of steps.
        """
        if not all_finite(leaves):
            return
        tensors: dict[str, Tensor] = {}
        for name, leaf in leaves.items():
            tensors[f"value/{name}"] = leaf.detach().cpu().contiguous()
            for moment in MOMENTS if leaf in optimizer.state else ():
                tensors[f"{moment}/{name}"] = optimizer.state[leaf][moment].cpu().contiguous()
        save_state(self.path, tensors, {"key": self.key, "history": json.dumps(history)})

    def load(self, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> list[Any]:
        """Set parameters and moments to the saved state of the same run; return its history.

        Without one nothing is touched, and the history is empty.

        Raises:
            InputError: another version of this project wrote the state.
        """
        state = load_state(self.path, self.key)
        if state is None:
            return []
        stored, notes = state
        try:
            history = json.loads(notes["history"])
            values = {name: stored[f"value/{name}"].reshape(v.shape) for name, v in leaves.items()}
        except (KeyError, ValueError, RuntimeError):
            _discard(self.path)
            return []
        for name, leaf in leaves.items():
            leaf.data.copy_(values[name])
            if f"exp_avg/{name}" in stored:
                optimizer.state[leaf] = {
                    moment: stored[f"{moment}/{name}"].to(
                        "cpu" if moment == "step" else leaf.device
                    )
                    for moment in MOMENTS
                }
        return history


def save_state(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors and texts with their checksum, replacing an earlier state whole.

    Args:
        path: The file; its folder exists.
        tensors: On the CPU and contiguous.
        notes: Texts by name; "key" identifies the run.
    """
    notes = {"format": FORMAT, **notes}
    notes["sha256"] = _digest(tensors, notes)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(dict(tensors), temporary, metadata=notes)
    temporary.replace(path)


def load_state(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return the tensors and notes of a run's state; None without one, or one that is damaged.

    Raises:
        InputError: another version of this project wrote the state.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = dict(file.metadata() or {})
        if notes.pop("sha256") != _digest(stored, notes):
            raise ValueError("checksum")
        if (found := notes.get("format", "1")) != FORMAT:
            raise InputError(
                f"{path}: state of format {found} but {FORMAT} is expected. Go on with "
                "the version of icm_ray that wrote it, or remove the file to start again."
            )
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        _discard(path)
        return None
    return (stored, notes) if notes["key"] == key else None


def _discard(path: Path) -> None:
    log.warning("%s: damaged, so the run starts again from its beginning.", path.name)
    path.unlink()


def scratch_folder(folder: Path, verb: str, key: str) -> Path:
    """Return the existing scratch folder of the run that makes `folder`; see `scratch_place`."""
    scratch = scratch_place(folder, verb, key)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def scratch_place(folder: Path, verb: str, key: str) -> Path:
    """Return where the run that makes `folder` keeps its unfinished state.

    Args:
        folder: What the run makes.
        verb: What it does there: "learning", "training" or "merging".
        key: Identifies the run.
    """
    return folder.with_name(f".{folder.name}.{verb}-{key[:12]}")


def all_finite(leaves: Mapping[str, Tensor]) -> bool:
    """Say whether every value of every parameter is a number."""
    return all(bool(leaf.isfinite().all()) for leaf in leaves.values())


def _digest(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    """Return the sha256 of all that is in a state."""
    digest = hashlib.sha256(json.dumps(dict(sorted(notes.items()))).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()
