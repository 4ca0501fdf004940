"""PEFT folders written by hand, fast enough to make for every test, and recipes around them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."
SHAPES = {
    f"encoder.layer.{layer}.attention.self.{leaf}": (16, 16)
    for layer in range(2)
    for leaf in ("query", "value")
}
"""Modules of the tiny BERT."""


def save_lora(
    folder: Path,
    seed: int = 0,
    *,
    rank: int = 2,
    size: float = 1.0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    saved: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write a random adapter; `saved` are whole tensors as `modules_to_save` leaves them."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        a, b = torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = (b * size).to(dtype)
    for name, tensor in (saved or {}).items():
        tensors[f"{PREFIX}{name}"] = tensor
    plain = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "task_type": "FEATURE_EXTRACTION",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
    }
    if saved:
        plain["modules_to_save"] = sorted({name.split(".")[0] for name in saved})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def recipe_of(
    path: Path, folders: Mapping[str, Path], *, output: object = None, **keys: Any
) -> Path:
    """Write a merge recipe for `{name: folder}`; it merges into `merged` beside the recipe."""
    adapters = [{"name": name, "path": str(folder)} for name, folder in folders.items()]
    content = {"adapters": adapters, "method": "soup", **keys}
    content["output"] = output or {"path": str(path.with_name("merged"))}
    path.write_text(yaml.safe_dump(content))
    return path
