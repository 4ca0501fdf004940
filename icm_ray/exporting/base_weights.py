"""A base model's stored weights, and where in them each adapted module's weight is."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, fit_base
from icm_ray.adapters.base_fit import architecture
from icm_ray.adapters.base_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, open_base
from icm_ray.adapters.contents import DTYPES, EMBEDDING
from icm_ray.adapters.formats.shards import read_shards
from icm_ray.adapters.fused import find_parameter, is_expert, matched_path, place_of
from icm_ray.adapters.header import TensorInfo, read_header
from icm_ray.adapters.policy import MAX_CONFIG_BYTES, short
from icm_ray.adapters.raw_files import read_table
from icm_ray.errors import InputError, by_cause
from icm_ray.exporting.stored_names import Source, sources_of

_CHECK = "Check the base."


@dataclass(frozen=True)
class BaseWeights:
    """A base on disk; no tensor is read.

    Attributes:
        folder: Its folder.
        config: Contents of its `config.json`.
        adapter: The adapter, its modules under this release's names.
        model: Its architecture without weights.
        header: Every stored tensor by name.
        files: Name of each tensor's file.
        is_sharded: Whether an index says which file is whose.
    """

    folder: Path
    config: Mapping[str, Any]
    adapter: AdapterFile
    model: Any
    header: Mapping[str, TensorInfo]
    files: Mapping[str, str]
    is_sharded: bool

    def stored(self, name: str) -> str | None:
        """Return what a weight of the architecture is called in the files, if it is there."""
        source = self.sources.get(name)
        return source.keys[0] if source and len(source.keys) == 1 else None

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """What the files call each weight of the architecture, as transformers reads them."""
        return sources_of(self.model, {key: info.shape for key, info in self.header.items()})

    @property
    def ties(self) -> Mapping[str, str]:
        """Weights that are another's, which the files may leave out, and whose they are."""
        return self.model.all_tied_weights_keys or {}


@dataclass(frozen=True)
class Target:
    """A stored matrix to change.

    Attributes:
        module: The adapter's module.
        key: The tensor's name in the written files.
        is_turned: Whether it is stored as (d_in, d_out).
        piece: Which of how many pieces of the tensor's first axis it is; None for all of it.
        rows: Which of the change's rows belong there; None for all.
    """

    module: str
    key: str
    is_turned: bool
    piece: tuple[int, int] | None = None
    rows: range | None = None

    def matrix(self, info: TensorInfo) -> TensorInfo:
        """Return where the matrix lies in the tensor that a header describes."""
        if self.piece is None:
            return info
        index, count = self.piece
        rows, rest = info.shape[0] // count, info.shape[1:]
        shape = rest if (rows, len(rest)) == (1, 2) else (rows, *rest)
        size = math.prod(shape) * DTYPES[info.dtype].itemsize
        return replace(info, shape=shape, start=info.start + index * size)


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
    opened = open_base(folder)
    (adapter,) = fit_base([adapter], opened)
    model = architecture(opened, adapter)
    return BaseWeights(folder, config, adapter, model, header, files, is_sharded)


def find_targets(base: BaseWeights) -> list[Target]:
    """Return the stored matrices that each module changes; modules in the adapter's order.

    Raises:
        InputError: naming every module whose weight is missing, quantised, of another shape, or
            converted in a way that a change cannot follow.
    """
    targets: list[Target] = []
    problems: list[tuple[str, str]] = []
    adapter, layers = base.adapter, dict(base.model.named_modules())
    for module, (d_out, d_in, _) in adapter.shapes.items():
        layout = adapter.layouts.get(module)
        name = matched_path(module, layout) if is_expert(layout) else f"{module}.weight"
        source = base.sources.get(name)
        if source and source.operation:
            problem = f"stored in a form that transformers loads through {source.operation}"
            advice = "Serve the adapter beside the base instead"
            problems.append((module, f"{problem} but the weight itself is expected. {advice}."))
            continue
        key = base.stored(name) or _partner(base, name)
        if key is None and (source is None or not is_expert(layout)):
            problems.append((module, f"no weight in {base.folder} but one is expected. {_CHECK}"))
            continue
        own = list(_matrices(module, layout, base, layers))
        for target in own:
            info = target.matrix(
                base.header[target.key if target.key in base.header else key or ""]
            )
            rows = d_out if target.rows is None else len(target.rows)
            wanted = (d_in, rows) if target.is_turned else (rows, d_in)
            shape = (info.shape[0], math.prod(info.shape[1:])) if info.shape else ()
            if info.dtype not in DTYPES:
                known = ", ".join(DTYPES)
                problems.append((module, f"{info.dtype} but one of {known} is expected. {_CHECK}"))
            elif shape != wanted:
                expected = f"{short(wanted)} is expected. {_CHECK}"
                problems.append((module, f"{short(shape)} but {expected}"))
        targets += own
    if problems:
        lines = by_cause(problems)
        raise InputError(f"{adapter.name}: {line}" for line in lines)
    return targets


def _matrices(
    module: str, layout: str | None, base: BaseWeights, layers: Mapping[str, Any]
) -> Iterator[Target]:
    """Yield the stored matrices of a module's weight; there are several if it was put together."""
    if layout is None or not is_expert(layout):
        name = f"{module}.weight"
        is_turned = type(layers.get(module)).__name__ == "Conv1D" or layout == EMBEDDING
        piece = base.sources[name].piece if name in base.sources else None
        yield Target(module, base.stored(name) or name, is_turned, piece)
        return
    place, (expert, count) = find_parameter(layers, module), place_of(layout)
    source = base.sources[matched_path(module, layout)]
    is_turned = place is not None and place[1]
    if len(source.keys) == 1:
        yield Target(module, source.keys[0], is_turned != source.is_turned, (expert, count))
        return
    height = base.header[source.keys[0]].shape[0]
    for part, key in enumerate(source.of_expert(expert)):
        yield Target(module, key, False, rows=range(part * height, (part + 1) * height))


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
