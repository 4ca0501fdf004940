"""The base model: loaded from a folder, or rebuilt around weights that are already in memory."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icm_ray.errors import InputError

Weights = Mapping[str, np.ndarray]
"""A base's tensors as numpy arrays: what the object store shares without a copy."""


@dataclass(frozen=True)
class Base:
    """A frozen base model, ready for `low_rank.applied`.

    Attributes:
        model: In eval mode, gradients off. Its tensors may be shared with other processes and
            must never be written to in place.
        tokenizer: The tokenizer beside it.
        path: Folder with config and tokenizer.
    """

    model: nn.Module
    tokenizer: Any
    path: Path

    @property
    def d_model(self) -> int:
        """Width of the last hidden state."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr]


def load_weights(path: Path) -> dict[str, np.ndarray]:
    """Read a base's weights as float32 numpy arrays, by parameter name.

    Raises:
        InputError: the folder holds no model that transformers can load from safetensors.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        # A weight the folder lacks (BERT's pooler, often) is drawn, by everybody alike.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModel.from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{path}: not a loadable base model ({error}).") from None
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def build_base(path: Path, weights: Weights, *, device: str, dtype: str) -> Base:
    """Return a Base around `weights` without copying them (on CPU, in float32).

    The modules are created empty and the arrays become their storage, so any number of processes
    on a node hold one copy between them.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, trust_remote_code=False)
    with warnings.catch_warnings():
        # The arrays are read-only on purpose, and torch says so once.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    return Base(model, load_tokenizer(path), path)


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer beside a base."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_base(path: Path, *, device: str = "cpu", dtype: str = "float32") -> Base:
    """Load a base model and its tokenizer from a folder."""
    return build_base(path, load_weights(path), device=device, dtype=dtype)


def fingerprint_weights(weights: Weights) -> str:
    """Return the sha256 over names, shapes and bytes of a base's weights."""
    digest = sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule an adapter calls `path`.

    Adapters trained on a model with a task head carry one prefix more or less than the bare base
    (`bert.encoder...`), which transformers names `base_model_prefix`.

    Raises:
        InputError: the base has no such module.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for name in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    raise InputError(
        f"module {path}: not in {type(model).__name__}. The adapter belongs to another base."
    )


def to_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the batch on the model's device."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
