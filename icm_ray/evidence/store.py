"""Evidence on disk: one safetensors file and one JSON, stamped with what it came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from icm_ray.errors import InputError
from icm_ray.evidence.gather import AdapterEvidence
from icm_ray.evidence.tensors import TENSORS, read_evidence, write_evidence
from icm_ray.types import NullSpaceRatios, TaskVectors


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
    write_evidence(
        folder,
        "task_vectors",
        tensors,
        adapters={e.task: e.fingerprint for e in gathered},
        described={"modules": modules, "inputs": {e.task: e.inputs for e in gathered}},
        origin=origin,
    )


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
    evidence = read_evidence(folder)
    stamped = evidence.adapters
    wrong = [task for task, print_ in (adapters or {}).items() if stamped.get(task) != print_]
    if wrong:
        raise InputError(
            f"{folder}: evidence of other adapters than given for {', '.join(sorted(wrong))}. "
            "Gather it again with jobs.evidence."
        )
    tensors = load_file(folder / TENSORS)
    vectors = {task: tensors[f"task_vector/{task}"] for task in stamped}

    def ratios(kind: str) -> dict[str, dict[str, float]]:
        return {
            task: dict(
                zip(
                    evidence.described["modules"][task],
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
