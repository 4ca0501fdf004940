"""A base model's stored weights, and where in them each adapted module's weight is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile
from icm_ray.adapters.base_fit import architecture
from icm_ray.adapters.base_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, open_base
from icm_ray.adapters.contents import DTYPES, EMBEDDING
from icm_ray.adapters.formats.shards import read_shards
from icm_ray.adapters.header import TensorInfo, read_header
from icm_ray.adapters.policy import MAX_CONFIG_BYTES, short
from icm_ray.adapters.raw_files import read_table
from icm_ray.errors import InputError


@dataclass(frozen=True)
class BaseWeights:
    """A base on disk; no tensor is read.

    Attributes:
        folder: Its folder.
        config: Contents of its `config.json`.
        model: Its architecture without weights.
        header: Every stored tensor by name.
        files: Name of each tensor's file.
        is_sharded: Whether an index says which file is whose.
    """

    folder: Path
    config: Mapping[str, Any]
    model: Any
    header: Mapping[str, TensorInfo]
    files: Mapping[str, str]
    is_sharded: bool

    def stored(self, name: str) -> str | None:
        """Return what a weight of the architecture is called in the files, if it is there.

        A model that was saved without its head, or with one, has one prefix less or more.
        """
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        names = (name, prefix + name, name.removeprefix(prefix))
        return next((known for known in names if known in self.header), None)

    @property
    def ties(self) -> Mapping[str, str]:
        """Weights that are another's, which the files may leave out, and whose they are."""
        return self.model.all_tied_weights_keys or {}


@dataclass(frozen=True)
class Target:
    """A weight to change.

    Attributes:
        module: The adapter's module.
        key: The tensor's name in the written files.
        is_turned: Whether it is stored as (d_in, d_out).
    """

    module: str
    key: str
    is_turned: bool


def read_base(folder: Path, adapter: AdapterFile) -> BaseWeights:
    """Read a base's config and its weights' headers.

    Raises:
        InputError: a file is missing or damaged, or the weights are quantised.
    """
    config = read_table(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key in ("quantization_config", "quantization"):
        if any(part.get(key) for part in parts):
            raise InputError(
                f"{folder / CONFIG_FILE}: {key}: a quantised base but stored numbers that a change "
                "can be added to are expected. Export with the base it was quantised from."
            )
    is_sharded = not (folder / WEIGHTS_FILE).exists()
    if is_sharded:
        header, places = read_shards(folder / INDEX_FILE)
        files = {key: place.file.name for key, place in places.items()}
    else:
        header = read_header(folder / WEIGHTS_FILE)
        files = dict.fromkeys(header, WEIGHTS_FILE)
    model = architecture(open_base(folder), adapter)
    return BaseWeights(folder, config, model, header, files, is_sharded)


def find_targets(adapter: AdapterFile, base: BaseWeights) -> list[Target]:
    """Return the weight that each module changes.

    Raises:
        InputError: naming every module whose weight is missing, quantised or of another shape.
    """
    layers = dict(base.model.named_modules())
    targets, problems = [], []
    for module, (d_out, d_in, _) in adapter.shapes.items():
        name = f"{module}.weight"
        key = base.stored(name)
        info = base.header.get(key or _partner(base, name) or "")
        if info is None:
            problems.append(f"{module}: no weight in {base.folder} but one is expected")
            continue
        is_conv1d = type(layers.get(module)).__name__ == "Conv1D"
        is_turned = is_conv1d or adapter.layouts.get(module) == EMBEDDING
        shape = (info.shape[0], math.prod(info.shape[1:])) if info.shape else ()
        wanted = (d_in, d_out) if is_turned else (d_out, d_in)
        if info.dtype not in DTYPES:
            problems.append(f"{module}: {info.dtype} but one of {', '.join(DTYPES)} is expected")
        elif shape != wanted:
            problems.append(f"{module}: {short(shape)} but {short(wanted)} is expected")
        targets.append(Target(module, key or name, is_turned))
    if problems:
        raise InputError(f"{adapter.name}: {line}. Check the base." for line in problems)
    return targets


def _partner(base: BaseWeights, name: str) -> str | None:
    """Return the stored tensor that stands for a weight because the base ties the two."""
    pairs = [*base.ties.items(), *((source, target) for target, source in base.ties.items())]
    return next((key for one, other in pairs if one == name and (key := base.stored(other))), None)


def copies_to_untie(targets: list[Target], base: BaseWeights) -> dict[str, str] | None:
    """Return what must be stored twice so that a change of one tied weight leaves the other alone.

    An adapter that is loaded changes one layer only; a merged weight that is tied would change
    both. So the tie is undone, and each layer gets its own weight.

    Returns:
        `{name to write: stored tensor to copy}`, or None if no target is tied.

    Raises:
        InputError: undoing the tie would change the model's own arithmetic.
    """
    tied = {base.stored(name) or name for pair in base.ties.items() for name in pair}
    changed = [target.module for target in targets if target.key in tied]
    if not changed:
        return None
    both = [pair for pair in base.ties.items() if all(map(base.stored, pair))]
    if base.config.get("is_encoder_decoder") or both:
        why = f"stored as {' and '.join(both[0])}" if both else "tied in an encoder-decoder"
        raise InputError(
            f"{base.folder}: {changed[0]}: {why} but one weight that can be untied is expected. "
            "Serve the adapter beside the base instead."
        )
    missing = [name for pair in base.ties.items() for name in pair if not base.stored(name)]
    return {name: key for name in missing if (key := _partner(base, name))}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config with the ties of its embeddings undone."""
    inner = {
        key: {**value, "tie_word_embeddings": False}
        for key, value in config.items()
        if isinstance(value, dict) and key == "text_config"
    }
    return {**config, **inner, "tie_word_embeddings": False}
