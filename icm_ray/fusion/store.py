"""A Fusion-VAE on disk: evidence like any other, one safetensors file and one JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icm_ray.errors import InputError
from icm_ray.evidence.tensors import as_evidence, model_of, write_evidence
from icm_ray.fusion_vae.model import KIND, FusionModel


def save_fusion(model: FusionModel, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Write a model to a new folder, all or nothing.

    Args:
        model: What to write.
        folder: The output.
        origin: What it was made from, such as the run's key; stored in the manifest.
    """
    write_evidence(
        folder,
        KIND,
        model.tensors(),
        adapters=model.adapters,
        described=model.described(),
        origin=origin,
    )


def load_fusion(folder: Path) -> FusionModel:
    """Read a model back.

    Raises:
        InputError: the folder is not intact, or holds another kind of evidence.
    """
    evidence = as_evidence(folder)
    if evidence is None or evidence.kind != KIND:
        raise InputError(f"{folder}: no Fusion-VAE. Train one with jobs.train_fusion.")
    return model_of(evidence)
