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

from icm_ray.adapters.base_folder import named, open_base, require_weights
from icm_ray.adapters.base_skeleton import is_finite, missing_lines, missing_weights, own_class
from icm_ray.base_model.prompts import UNBOUNDED
from icm_ray.base_model.readers import ImageReader, Reader, TextReader
from icm_ray.errors import InputError

Weights = Mapping[str, np.ndarray]
"""A base's tensors as numpy arrays: what the object store shares without a copy."""


@dataclass(frozen=True)
class Base:
    """A frozen base model, ready for `low_rank.applied`.

    Attributes:
        model: The bare model, whose output is hidden states. In eval mode, gradients off. Its
            tensors may be shared with other processes and must never be written to in place.
        reader: Turns texts or images into batches.
        path: Folder with config and tokenizer.
        whole: The model with its language-model head, or `model` again where there is none.
    """

    model: nn.Module
    reader: Reader
    path: Path
    whole: nn.Module

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model; only bases that read texts have one."""
        assert isinstance(self.reader, TextReader)
        return self.reader.tokenizer

    @property
    def d_model(self) -> int:
        """Width of the last hidden state; that of texts where images have a tower of their own."""
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[union-attr]

    def weights(self) -> dict[str, Tensor]:
        """Return every tensor once, by name."""
        return _distinct(self.whole.state_dict())


def load_weights(path: Path) -> dict[str, np.ndarray]:
    """Read a base's weights as float32 numpy arrays, by parameter name.

    What the files lack is told through Python's `warnings`.

    Raises:
        InputError: the folder holds no model that transformers can load from safetensors, or
            weights that are NaN or infinite.
    """
    base = open_base(path)
    require_weights(base)
    for line in missing_lines(path, missing_weights(base)):
        warnings.warn(line, stacklevel=2)
    # A weight the folder lacks (BERT's pooler, often) is drawn, by everybody alike.
    with named(path, "no loadable base model"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = own_class(base.config).from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    weights = _distinct(model.state_dict())
    bad = [name for name, tensor in weights.items() if not is_finite(tensor)]
    if bad:
        raise InputError(
            f"{path}: {bad[0]}: NaN or infinity in {len(bad)} of {len(weights)} tensors but finite "
            "ones are expected. Download the base again."
        )
    return {name: tensor.numpy() for name, tensor in weights.items()}


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without the second names of tied tensors."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), name)
    return {name: state[name] for name in state if name in set(first.values())}


def build_base(path: Path, weights: Weights, *, device: str, dtype: str) -> Base:
    """Return a Base around `weights` without copying them (on CPU, in float32).

    The modules are created empty and the arrays become their storage, so any number of processes
    on a node hold one copy between them.
    """
    from accelerate import init_empty_weights

    config = _config(path)
    with init_empty_weights(include_buffers=False):
        whole = own_class(config).from_config(config, trust_remote_code=False)
    with warnings.catch_warnings():
        # The arrays are read-only on purpose, and torch says so once.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    found = whole.load_state_dict(tensors, strict=False, assign=True)
    whole.tie_weights()
    empty = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    if empty or found.unexpected_keys:
        raise InputError(f"{path}: other weights than its config says ({empty[:1]}).")
    whole = whole.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    return Base(whole.base_model, load_reader(path), path, whole)


def load_reader(path: Path) -> Reader:
    """Return what turns a base's inputs into batches: its tokenizer, or its patches' size."""
    from transformers import AutoTokenizer

    config = _config(path)
    if hasattr(config, "patch_size"):
        return ImageReader(config.patch_size, 1 + getattr(config, "num_register_tokens", 0))
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return TextReader(tokenizer, _longest(config, tokenizer))


def _longest(config: Any, tokenizer: Any) -> int:
    """Return the most tokens a model reads: its positions', or what its tokenizer says."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(own, int) and "roberta" in config.model_type:
        own -= config.pad_token_id + 1  # its positions count from behind the padding's
    said = [n for n in (own, tokenizer.model_max_length) if isinstance(n, int) and n > 0]
    return min([UNBOUNDED, *said])


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
