"""An adapter in another tool's format: the stored factors under other names, bit for bit."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from icm_ray.adapters import AdapterFile, open_adapter
from icm_ray.adapters.contents import EMBEDDING, tensor_keys
from icm_ray.adapters.formats import diffusers, kohya, mlx
from icm_ray.adapters.fused import is_expert
from icm_ray.adapters.policy import CONFIG_FILE
from icm_ray.errors import InputError
from icm_ray.files import refuse_foreign, refuse_inputs, whole_folder, write_json

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A and B of every module as they are stored, before scaling."""


@dataclass(frozen=True)
class Contents:
    """What a folder of some format holds.

    Attributes:
        file: Name of the weights file.
        tensors: Its tensors.
        names: What each module is called when the file is read again.
        metadata: Of the weights file.
        config: Contents of `adapter_config.json`, where the format has one.
    """

    file: str
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    config: Mapping[str, Any] | None = None


def export_adapter(adapter: AdapterFile, form: str, out: Path) -> None:
    """Write an adapter in another format, read it again, and only then show it.

    Args:
        adapter: What to write.
        form: A name in `ADAPTER_FORMATS`.
        out: The folder; appears whole or not at all.

    Raises:
        InputError: the format cannot say what the adapter holds, or `out` is somebody else's.
    """
    refuse_inputs(out, {f"adapter {adapter.name!r}": adapter.path})
    refuse_foreign(out)
    _refuse(
        adapter,
        [m for m in adapter.shapes if is_expert(adapter.layouts.get(m))],
        f"an expert inside of one parameter but {form} has factors of whole modules. Export the "
        "whole model, with --base.",
    )
    with adapter.open() as handle:
        keys = {m: tensor_keys(m, adapter.layouts.get(m)) for m in adapter.shapes}
        factors = {m: (handle.get_tensor(a), handle.get_tensor(b)) for m, (a, b) in keys.items()}
    contents = ADAPTER_FORMATS[form](adapter, factors)
    with whole_folder(out) as folder:
        tensors = {key: value.contiguous() for key, value in sorted(contents.tensors.items())}
        save_file(tensors, folder / contents.file, metadata=dict(contents.metadata))
        if contents.config is not None:
            write_json(folder / CONFIG_FILE, contents.config)
        _compare(open_adapter(folder / contents.file), adapter, contents.names)


def _compare(written: AdapterFile, adapter: AdapterFile, names: Mapping[str, str]) -> None:
    problems = []
    for module, name in names.items():
        new, old = written.factors(name), adapter.factors(module)
        if not torch.equal(new.a, old.a) or not torch.allclose(new.b, old.b, rtol=1e-6, atol=0):
            problems.append(
                f"{adapter.name}: {module}: another change when it is read again but the same is "
                "expected. Export the merged adapter, whose scaling is 1."
            )
    if problems or len(written.shapes) != len(names):
        raise InputError(problems or [f"{adapter.name}: modules were lost. Report this."])


def _kohya(adapter: AdapterFile, factors: Factors) -> Contents:
    two = any(module.startswith("text_encoder_2.") for module in factors)
    mangled = {m: kohya.mangled(m, two_encoders=two) or "" for m in factors}
    _refuse(
        adapter,
        [m for m, name in mangled.items() if not name],
        f"no name of kohya's but modules of {', '.join(sorted(set(kohya.PREFIXES.values())))} are "
        "expected. Choose another format.",
    )
    taken = list(mangled.values())
    _refuse(
        adapter,
        [m for m, name in mangled.items() if taken.count(name) > 1],
        "the same name as another module in kohya's format but one of its own is expected. "
        "Choose another format.",
    )
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in factors.items():
        values = {"A": a, "B": b, "alpha": _alpha(adapter.scaling[module] * len(a))}
        tensors |= {mangled[module] + kohya.ENDINGS[side]: x for side, x in values.items()}
    return Contents(
        file=f"{adapter.name}.safetensors",
        tensors=tensors,
        names={module: kohya.module_path(name) for module, name in mangled.items()},
    )


def _alpha(value: float) -> Tensor:
    """Return a number as float32 if that holds it, else as float64."""
    single = torch.tensor(value, dtype=torch.float32)
    return single if float(single) == value else torch.tensor(value, dtype=torch.float64)


def _diffusers(adapter: AdapterFile, factors: Factors) -> Contents:
    _refuse(
        adapter,
        [module for module in factors if not re.match(rf"{diffusers.ROOTS}\.", module)],
        "no component of a pipeline but a path such as unet.... is expected. "
        "Choose another format.",
    )
    _refuse(
        adapter,
        [module for module, scaling in adapter.scaling.items() if scaling != 1],
        "a scaling other than 1 but diffusers' files have none. Export the merged adapter.",
    )
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in factors.items():
        values = {"A": a, "B": b}
        tensors |= {module + diffusers.ENDINGS[side]: x for side, x in values.items()}
    return Contents(diffusers.WEIGHTS_FILE, tensors, {module: module for module in factors})


def _mlx(adapter: AdapterFile, factors: Factors) -> Contents:
    odd = [m for m, layout in adapter.layouts.items() if layout != EMBEDDING]
    _refuse(adapter, odd, "a convolution but MLX adapts linear layers. Choose another format.")
    odd = [
        module
        for module in factors
        if (module.rpartition(".")[2] in mlx.EMBEDDINGS) != (module in adapter.layouts)
    ]
    _refuse(adapter, odd, "read back as another kind of layer. Choose another format.")
    scales = sorted(set(adapter.scaling.values()))
    if len(scales) > 1:
        raise InputError(
            f"{adapter.name}: scalings from {scales[0]:g} to {scales[-1]:g} but MLX has one for "
            "all modules. Export the merged adapter, whose scaling is 1."
        )
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in factors.items():
        values = {"A": a.T, "B": b.T}
        tensors |= {module + mlx.ENDINGS[side]: x for side, x in values.items()}
    parameters = {"rank": adapter.max_rank, "scale": scales[0], "dropout": 0.0}
    # MLX looks for these inside each layer, and in the whole model for what is outside of them.
    inside = {re.sub(r"^.*?\blayers\.\d+\.", "", module) for module in factors}
    config = {"fine_tune_type": "lora", "model": adapter.base_model, "num_layers": -1}
    config["lora_parameters"] = {**parameters, "keys": sorted(inside)}
    return Contents(
        file=mlx.WEIGHTS_FILE,
        tensors=tensors,
        names={module: module for module in factors},
        metadata={"format": "mlx"},
        config=config,
    )


def _refuse(adapter: AdapterFile, modules: list[str], why: str) -> None:
    if modules:
        raise InputError(f"{adapter.name}: {modules[0]} and {len(modules) - 1} others: {why}")


ADAPTER_FORMATS: Mapping[str, Callable[[AdapterFile, Factors], Contents]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "mlx": _mlx,
}
"""Formats an adapter can be written in, by name."""
