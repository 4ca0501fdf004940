"""The base model: mapped from its folder in the precision it is stored in."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from icm_ray.adapters.base_folder import BaseFolder, named, open_base, require_weights
from icm_ray.adapters.base_skeleton import (
    SAFELY,
    build,
    is_finite,
    missing_lines,
    missing_weights,
    own_class,
)
from icm_ray.adapters.contents import DTYPES
from icm_ray.base_model.image_text import load_processor
from icm_ray.base_model.packed import load_packed
from icm_ray.base_model.pictures import ANY_SIZE, Preprocessing
from icm_ray.base_model.placing import HERE, Place, device_plan, offloaded, placed
from icm_ray.base_model.prompts import UNBOUNDED
from icm_ray.base_model.readers import ImageReader, Reader, TextReader
from icm_ray.errors import InputError

Weights = Mapping[str, Tensor]
"""A base's tensors by parameter name, as they are stored."""


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


def load_weights(path: Path, *, is_known: bool = False) -> Weights:
    """Return a base's weights as they are stored; of a quantised one all that its files hold.

    Where the files hold them under the model's own names they are mapped, not read: processes of
    one machine share their pages, and what nobody touches stays on disk.

    Args:
        path: The base's folder.
        is_known: Somebody has looked at the values of this folder before: what the files lack
            is not told again through Python's `warnings`, and no value is read.

    Raises:
        InputError: the folder holds no model that transformers can load from safetensors, or
            weights that are NaN or infinite.
    """
    base = open_base(path)
    require_weights(base)
    if base.quantised:
        weights = _read(base, base.tensors)
    else:
        for line in [] if is_known else missing_lines(path, missing_weights(base)):
            warnings.warn(line, stacklevel=2)
        weights = _mapped(base) or _converted(base)
    bad = [] if is_known else [name for name, tensor in weights.items() if not is_finite(tensor)]
    if bad:
        raise InputError(
            f"{path}: {bad[0]}: NaN or infinity in {len(bad)} of {len(weights)} tensors but finite "
            "ones are expected. Download the base again."
        )
    return weights


def _mapped(base: BaseFolder) -> Weights | None:
    """Return the files' own tensors if they are the model's, name by name and in one precision."""
    model = build(base, own_class(base.config))
    wanted = {**dict(model.named_parameters()), **_kept_buffers(model)}
    stored = {name: info.shape for name, (_, info) in base.tensors.items()}
    if any(stored.get(name) != tuple(tensor.shape) for name, tensor in wanted.items()):
        return None
    weights = _read(base, wanted)
    return weights if len(_precisions(weights)) <= 1 else None


def _read(base: BaseFolder, names: Iterable[str]) -> Weights:
    """Return tensors of a base's files, mapped."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(base.tensors[name][0], []).append(name)
    weights: dict[str, Tensor] = {}
    for file, mine in sorted(by_file.items()):
        with safe_open(file, framework="pt") as handle:
            weights |= {name: handle.get_tensor(name) for name in mine}
    return weights


def _converted(base: BaseFolder) -> Weights:
    """Return what transformers makes of the files: under new names, in one precision, or drawn."""
    # A weight the folder lacks (BERT's pooler, often) is drawn, by everybody alike.
    with named(base.path, "no loadable base model"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = own_class(base.config).from_pretrained(
            base.path, dtype=stored_dtype(base), **SAFELY
        )
    return _distinct(model.state_dict())


def stored_dtype(base: BaseFolder) -> torch.dtype:
    """Return the precision that most numbers of a base are stored in, or run in if quantised."""
    if base.quantised and base.config.dtype:
        return base.config.dtype
    sizes: Counter[torch.dtype] = Counter()
    for _, info in base.tensors.values():
        if info.dtype in DTYPES:
            sizes[DTYPES[info.dtype]] += math.prod(info.shape)
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _precisions(weights: Weights) -> set[torch.dtype]:
    return {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without the second names of tied tensors."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), name)
    return {name: state[name] for name in state if name in set(first.values())}


def build_base(path: Path, weights: Weights, place: Place = HERE) -> Base:
    """Return a Base around `weights`, without copying them where device and precision allow.

    A quantised base is read from its folder by the library that packed it.

    Args:
        path: Folder with config and tokenizer.
        weights: As `load_weights` returns them; never written to.
        place: Where the model goes.

    Raises:
        InputError: the weights are not what the config says, or cannot be unpacked here.
    """
    base = open_base(path)
    plan = {"": place.device}
    if place.gpus > 1:
        plan = device_plan(build(base, own_class(base.config)), place.device, place.gpus)
    precision = getattr(torch, place.dtype) if place.dtype else None
    if base.quantised and place.offload:
        raise InputError(f"resources.offload: true but {path} is quantised. Leave it out.")
    if base.quantised:
        whole = load_packed(base, plan, precision or stored_dtype(base))
    else:
        precision = precision or next(iter(_precisions(weights)), None)
        whole = _around(base, weights)
        if place.offload:
            whole = offloaded(whole, place.device, precision)
        else:
            whole = placed(whole, plan, precision)
    whole = whole.eval().requires_grad_(False)
    return Base(whole.base_model, load_reader(path), path, whole)


def _around(base: BaseFolder, weights: Weights) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        whole = own_class(base.config).from_config(base.config, trust_remote_code=False)
    found = whole.load_state_dict(weights, strict=False, assign=True)
    whole.tie_weights()
    empty = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    if empty or found.unexpected_keys:
        raise InputError(f"{base.path}: other weights than its config says ({empty[:1]}).")
    return whole


def load_reader(path: Path) -> Reader:
    """Return what turns a base's inputs into batches: its tokenizer, or its patches' size.

    A vision-language model's processor comes with its tokenizer.
    """
    from transformers import AutoTokenizer

    config = _config(path)
    if hasattr(config, "patch_size"):
        side = None if config.model_type in ANY_SIZE else getattr(config, "image_size", None)
        preprocessing = Preprocessing(path, config.patch_size, side)
        return ImageReader(preprocessing, 1 + getattr(config, "num_register_tokens", 0))
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    processor = load_processor(path, config)
    if processor and not tokenizer.chat_template:
        tokenizer.chat_template = processor.own.chat_template
    return TextReader(tokenizer, _longest(config, tokenizer), processor)


def _longest(config: Any, tokenizer: Any) -> int:
    """Return the most tokens a model reads: its positions', or what its tokenizer says."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(own, int) and "roberta" in config.model_type:
        own -= config.pad_token_id + 1  # its positions count from behind the padding's
    said = [n for n in (own, tokenizer.model_max_length) if isinstance(n, int) and n > 0]
    return min([UNBOUNDED, *said])


def load_base(path: Path, place: Place = HERE) -> Base:
    """Load a base model and its tokenizer from a folder; see `build_base`."""
    return build_base(path, load_weights(path), place)


def fingerprint_weights(weights: Weights) -> str:
    """Return the sha256 over names, shapes and bytes of a base's weights."""
    digest = sha256()
    for name, tensor in sorted(weights.items()):
        plain = tensor.detach().contiguous()
        kind = str(plain.dtype).removeprefix("torch.")
        digest.update(f"{name}{tuple(plain.shape)}{kind}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
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
