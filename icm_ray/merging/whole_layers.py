"""Full layers that `modules_to_save` trained: kept for each task, or averaged into the merge."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from icm_ray.adapters import AdapterFile, class_of
from icm_ray.adapters.contents import is_saved
from icm_ray.errors import InputError, by_cause
from icm_ray.kinds import SavedModulesPolicy
from icm_ray.report.usage import Usage
from icm_ray.types import Adapter

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of full tensors by their path in the base model."""


def shapes_of(file: AdapterFile) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's full tensors; no value is read."""
    with file.open() as handle:
        keys = zip(file.saved_names, file.saved, strict=True)
        return {path: handle.get_shape(key) for path, key in keys}


def check_mean(files: Sequence[AdapterFile]) -> None:
    """Refuse an average of full layers that not every adapter has in one shape.

    Raises:
        InputError: every layer that an adapter lacks or has in another shape.
    """
    shapes = {file.name: shapes_of(file) for file in files}
    first = next((name for name, layers in shapes.items() if layers), None)
    if first is None:
        return
    wanted = shapes[first]
    advice = "modules_to_save: mean needs equal layers. Set it to keep or drop."
    wrong = [
        (
            name,
            f"{path}: {_words(layers.get(path))} but {_words(wanted.get(path))} as in {first} is "
            f"expected. {advice}",
        )
        for name, layers in shapes.items()
        for path in sorted(wanted.keys() | layers.keys())
        if layers.get(path) != wanted.get(path)
    ]
    if wrong:
        raise InputError(by_cause(wrong))


def _words(shape: tuple[int, ...] | None) -> str:
    return "no such layer" if shape is None else " x ".join(map(str, shape))


def with_mean(adapter: Adapter, files: Sequence[AdapterFile]) -> Adapter:
    """Return a merged adapter that carries the average of the files' full layers.

    PEFT finds them by `modules_to_save`, as it does in the files. Reads one adapter at a time.
    """
    check_mean(files)
    totals: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file in files:
        for path, tensor in file.whole_layers().items():
            dtypes.setdefault(path, tensor.dtype)
            totals[path] = totals.get(path, torch.zeros(())) + tensor.double()
    layers = {path: (total / len(files)).to(dtypes[path]) for path, total in totals.items()}
    names = {name for file in files for name in file.config.get("modules_to_save") or []}
    # PEFT carries resized embeddings without naming them, but loads no others of that name.
    names |= {path.rpartition(".")[0] for path in layers if not is_saved(path, names)}
    config = {**adapter.config, "modules_to_save": sorted(names)}
    return replace(adapter, saved_modules=layers, config=config) if layers else adapter


def write_each(files: Sequence[AdapterFile], folder: Path) -> dict[str, list[str]]:
    """Write each task's own full layers to `<task>.safetensors`; return their names by task."""
    kept = {}
    for file in files:
        if file.saved:
            folder.mkdir(exist_ok=True)
            layers = file.whole_layers()
            save_file(layers, folder / f"{file.name}.safetensors", metadata={"format": "pt"})
            kept[file.name] = list(layers)
    return kept


def usage_of(adapter: Adapter, files: Sequence[AdapterFile], policy: SavedModulesPolicy) -> Usage:
    """Return what a model card must know to load a merged adapter onto the right class."""
    classes = {file.name: class_of(file.config) for file in files} or {"": class_of(adapter.config)}
    shapes = {file.name: layers for file in files if (layers := shapes_of(file))}
    return Usage(
        classes={name: kind for name, kind in classes.items() if kind},
        kept=shapes if policy == "keep" else {},
        inside={path: tuple(x.shape) for path, x in adapter.saved_modules.items()},
    )
