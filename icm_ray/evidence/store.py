"""Evidence on disk: one safetensors file and one JSON, stamped with what it came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from icm_ray.errors import InputError
from icm_ray.evidence.gather import AdapterEvidence
from icm_ray.files import read_json, read_manifest, whole_folder, write_json
from icm_ray.types import NullSpaceRatios, TaskVectors

FORMAT = 1


def save_evidence(
    folder: Path, gathered: Sequence[AdapterEvidence], origin: Mapping[str, Any]
) -> None:
    """Write task vectors and ratios of K adapters to a new folder, all or nothing.

    Args:
        folder: The output.
        gathered: One entry a task.
        origin: What it was made from (base, data, key); stored in the manifest.
    """
    modules = {e.task: sorted(e.expert_ratios) for e in gathered}
    tensors = {}
    for e in gathered:
        tensors[f"task_vector/{e.task}"] = e.task_vector.contiguous()
        for kind, ratios in (("expert", e.expert_ratios), ("base", e.base_ratios)):
            values = [ratios[module] for module in modules[e.task]]
            tensors[f"null_space_ratio/{kind}/{e.task}"] = torch.tensor(values, dtype=torch.float64)
    described = {
        "format": FORMAT,
        "modules": modules,
        "adapters": {e.task: e.fingerprint for e in gathered},
        "inputs": {e.task: e.inputs for e in gathered},
    }
    with whole_folder(folder, info=origin) as target:
        save_file(dict(sorted(tensors.items())), target / "evidence.safetensors")
        write_json(target / "evidence.json", described)


def load_evidence(
    folder: Path, adapters: Mapping[str, str] | None = None
) -> tuple[TaskVectors, NullSpaceRatios]:
    """Read evidence back.

    Args:
        folder: Written by `save_evidence`.
        adapters: Fingerprints by task that the evidence must match.

    Raises:
        InputError: the folder is not intact or belongs to other adapters.
    """
    read_manifest(folder)
    described = read_json(folder / "evidence.json")
    if described.get("format") != FORMAT:
        raise InputError(f"{folder}: format {described.get('format')} but {FORMAT} is expected.")
    stamped: dict[str, str] = described["adapters"]
    wrong = [task for task, print_ in (adapters or {}).items() if stamped.get(task) != print_]
    if wrong:
        raise InputError(
            f"{folder}: evidence of other adapters than given for {', '.join(sorted(wrong))}. "
            "Gather it again with jobs.evidence."
        )
    tensors = load_file(folder / "evidence.safetensors")
    vectors = {task: tensors[f"task_vector/{task}"] for task in stamped}

    def ratios(kind: str) -> dict[str, dict[str, float]]:
        return {
            task: dict(
                zip(
                    described["modules"][task],
                    tensors[f"null_space_ratio/{kind}/{task}"].tolist(),
                    strict=True,
                )
            )
            for task in stamped
        }

    return (
        TaskVectors(vectors, stamped),
        NullSpaceRatios(ratios("expert"), ratios("base"), stamped),
    )
