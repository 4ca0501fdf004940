"""A whole model: the base's files copied, and the adapted weights changed in the copies.

Every shard is copied as bytes and each adapted weight is read, changed and written back a block of
rows at a time, so a model of any size needs the memory of one block. What no module of the adapter
names keeps its bits.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from icm_ray.adapters import AdapterFile
from icm_ray.adapters.base_fit import architecture
from icm_ray.adapters.base_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, open_base
from icm_ray.adapters.contents import DTYPES
from icm_ray.adapters.header import MAX_HEADER_BYTES, TensorInfo, open_tensors, read_header
from icm_ray.adapters.raw_files import read_table
from icm_ray.errors import InputError
from icm_ray.exporting.base_weights import (
    BaseWeights,
    Target,
    copies_to_untie,
    find_targets,
    read_base,
    untied,
)
from icm_ray.files import (
    MANIFEST,
    RESULTS_FILE,
    RUN_FILE,
    refuse_foreign,
    refuse_inputs,
    whole_folder,
    write_json,
)
from icm_ray.types import LoRAFactors

COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of what belongs to a model beside its weights: config, tokenizer, templates."""
NOT_COPIED = (INDEX_FILE, MANIFEST, RESULTS_FILE, RUN_FILE)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
"""What a single weights file and the weights that were tied become."""
UNTIED_SHARD = "model-untied.safetensors"
BLOCK_ELEMENTS = 2**22
"""Elements of a weight that are changed at once; 16 MB in float32."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the written model."""

    file: Path
    info: TensorInfo


def export_model(adapter: AdapterFile, base: Path, out: Path) -> None:
    """Write base plus adapter as a model folder, in the base's stored element types.

    Its outputs are those of the base with the adapter loaded; embeddings that the base ties to its
    head get weights of their own where the adapter changes one of the two.

    Args:
        adapter: The adapter; its modules are those of the base.
        base: A local transformers model folder.
        out: The folder; appears whole or not at all.

    Raises:
        InputError: the base is quantised, or lacks a module; all of them are named.
        ResourceError: the disk is full or not writable.
    """
    refuse_inputs(out, {f"adapter {adapter.name!r}": adapter.path, "base": base})
    refuse_foreign(out)
    weights = read_base(base, adapter)
    adapter, targets = weights.adapter, find_targets(weights)
    copies = copies_to_untie(targets, weights)
    with whole_folder(out, info={"adapter": adapter.fingerprint}) as folder:
        _copy_settings(base, folder)
        places = _copy_weights(weights, copies or {}, folder)
        _change(adapter, targets, places)
        if copies is not None:
            write_json(folder / CONFIG_FILE, untied(weights.config))
            if architecture(open_base(folder), adapter).all_tied_weights_keys:
                raise InputError(
                    f"{base}: ties weights that the adapter changes in a way that cannot be "
                    "undone. Serve the adapter beside the base instead."
                )


def _copy_settings(base: Path, folder: Path) -> None:
    for file in sorted(base.iterdir()):
        is_setting = file.suffix in COPIED or file.name.startswith("LICENSE")
        if is_setting and file.is_file() and file.name not in NOT_COPIED:
            shutil.copyfile(file, folder / file.name)


def _copy_weights(base: BaseWeights, copies: Mapping[str, str], folder: Path) -> dict[str, Place]:
    """Copy the base's files, write what is stored anew, and the index if there are several."""
    first, extra = (WEIGHTS_FILE, UNTIED_SHARD) if base.is_sharded or not copies else SHARDS
    names = {file: first if file == WEIGHTS_FILE else file for file in set(base.files.values())}
    for old, new in names.items():
        shutil.copyfile(base.folder / old, folder / new)
    places = {
        key: Place(folder / names[file], base.header[key]) for key, file in base.files.items()
    }
    if copies:
        tensors = {}
        for name, key in copies.items():
            with open_tensors(base.folder / base.files[key]) as handle:
                tensors[name] = handle.get_tensor(key)
        save_file(tensors, folder / extra, metadata={"format": "pt"})
        places |= {
            k: Place(folder / extra, info) for k, info in read_header(folder / extra).items()
        }
    if base.is_sharded or copies:
        write_json(folder / INDEX_FILE, _index(base, places))
    return places


def _index(base: BaseWeights, places: Mapping[str, Place]) -> dict[str, object]:
    old = read_table(base.folder / INDEX_FILE, MAX_HEADER_BYTES) if base.is_sharded else {}
    size = sum(
        math.prod(place.info.shape) * DTYPES[place.info.dtype].itemsize
        for place in places.values()
        if place.info.dtype in DTYPES
    )
    return {
        **old,
        "metadata": {"total_size": size},
        "weight_map": {key: place.file.name for key, place in sorted(places.items())},
    }


def _change(adapter: AdapterFile, targets: list[Target], places: Mapping[str, Place]) -> None:
    problems = []
    by_module: dict[str, list[Target]] = {}
    for target in targets:
        by_module.setdefault(target.module, []).append(target)
    for module, factors in adapter.stream():
        for target in by_module[module]:
            place = places[target.key]
            place = replace(place, info=target.matrix(place.info))
            own = factors
            if (rows := target.rows) is not None:
                own = LoRAFactors(factors.a, factors.b[rows.start : rows.stop])
            if not _add(place, own, is_turned=target.is_turned):
                problems.append(
                    f"{adapter.name}: {module}: values that the base's {place.info.dtype} cannot "
                    "hold but finite ones are expected. Export with a base in float32."
                )
    if problems:
        raise InputError(problems)


def _add(place: Place, factors: LoRAFactors, *, is_turned: bool) -> bool:
    """Add a change to a stored weight, in place; say whether all its values are finite."""
    dtype = DTYPES[place.info.dtype]
    exact = torch.promote_types(dtype, torch.float32)
    rows, width = place.info.shape[0], math.prod(place.info.shape[1:])
    left, right = (factors.a.T, factors.b.T) if is_turned else (factors.b, factors.a)
    step = max(1, BLOCK_ELEMENTS // width)
    is_finite = True
    with place.file.open("r+b") as handle:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            at = place.info.start + start * width * dtype.itemsize
            handle.seek(at)
            data = bytearray(handle.read(count * width * dtype.itemsize))
            block = torch.frombuffer(data, dtype=dtype).view(count, width)
            change = left[start : start + count] @ right
            block = (block.to(exact) + change.to(exact)).to(dtype)
            is_finite = is_finite and bool(block.isfinite().all())
            handle.seek(at)
            handle.write(block.view(torch.uint8).numpy().tobytes())
    return is_finite
