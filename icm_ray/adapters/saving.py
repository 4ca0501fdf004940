"""Writing an adapter as a folder that PEFT loads to exactly the same change."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from icm_ray.adapters.config_keys import TASKS_WITH_HEADS, model_class
from icm_ray.adapters.contents import PREFIX, is_saved, kernel_of, tensor_keys
from icm_ray.adapters.fingerprint import largest
from icm_ray.adapters.fused import (
    is_expert,
    matched_path,
    parameters_of,
    place_of,
    stacked,
    wrapper_paths,
)
from icm_ray.adapters.gaps import covered, find_gaps, plain_names
from icm_ray.adapters.peft_format import WEIGHTS_FILE
from icm_ray.adapters.policy import CONFIG_FILE, known_revision
from icm_ray.errors import InputError
from icm_ray.files import whole_folder, write_json
from icm_ray.linalg.lowrank import norm
from icm_ray.types import Adapter, LoRAFactors

HALF_LIMIT = 2.0
"""Relative error that rounding may cause, in units of an element type's precision."""
SAVED_MODULES_FILE = "saved_modules.safetensors"


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    info: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write `adapter` as a PEFT folder with a manifest, whole or not at all.

    Full tensors that the config's `modules_to_save` names go into PEFT's file, others beside it.
    The scaling stays inside B, so alpha equals the rank everywhere and rsLoRA is off. Modules of
    rank 0 are left out; if every module has rank 0 they are written as zeros of rank 1, since PEFT
    cannot load a file without tensors. Same adapter, same bytes.

    Args:
        adapter: What to write.
        path: The folder; one that this project wrote before is replaced.
        dtype: Element type in the file; the adapter's own by default.
        info: Entries for `manifest.json`.
        extra_files: Text files by name, such as README.md.

    Raises:
        InputError: there are no modules, a value does not fit into the element type, or the
            folder holds files that are not ours.
        ResourceError: the disk is full or not writable.
    """
    if not adapter.modules:
        raise InputError(f"{adapter.name}: no modules but some are expected. Check the merge.")
    dtype = dtype or adapter.dtype
    modules = {name: f for name, f in adapter.modules.items() if f.rank} or {
        name: _zeros(factors) for name, factors in adapter.modules.items()
    }
    tensors = _tensors(adapter, modules, dtype)
    layers = {name: _own(tensor) for name, tensor in adapter.saved_modules.items()}
    beside = {name: layers[name] for name in layers if not is_saved(name, _declared(adapter))}
    tensors |= {f"{PREFIX}{name}": layers[name] for name in layers.keys() - beside.keys()}
    with whole_folder(Path(path), info=info) as folder:
        write_json(folder / CONFIG_FILE, _config(adapter, modules))
        save_file(dict(sorted(tensors.items())), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if beside:
            save_file(beside, folder / SAVED_MODULES_FILE, metadata={"format": "pt"})
        for name, text in sorted((extra_files or {}).items()):
            if Path(name).name != name:
                raise InputError(f"{name}: a path but a file name is expected. Choose another.")
            (folder / name).write_text(text, encoding="utf-8")


def _zeros(factors: LoRAFactors) -> LoRAFactors:
    d_out, d_in = factors.shape
    return LoRAFactors(torch.zeros(1, d_in), torch.zeros(d_out, 1))


def _own(tensor: Tensor) -> Tensor:
    """Return a copy that shares no memory with another tensor, as safetensors demands."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _tensors(
    adapter: Adapter, modules: Mapping[str, LoRAFactors], dtype: torch.dtype
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    experts: dict[str, tuple[Tensor, Tensor]] = {}
    problems = []
    for module, factors in modules.items():
        layout = adapter.layouts.get(module)
        kernel = kernel_of(layout)
        a, b, error = rounded(factors, dtype)
        if error > HALF_LIMIT * torch.finfo(dtype).eps:
            problems.append(
                f"{adapter.name}: {module}: values too small for {dtype} but ones it holds are "
                "expected. Choose output dtype float32."
            )
        for key, values in zip(tensor_keys(module, layout), (a, b), strict=True):
            if not math.isfinite(largest(values)):
                problems.append(
                    f"{adapter.name}: {key}: values that {dtype} cannot hold but finite ones are "
                    "expected. Choose output dtype float32."
                )
        if is_expert(layout):
            experts[module] = a, b
            continue
        key_a, key_b = tensor_keys(module, layout)
        tensors[key_a] = _own(a.unflatten(1, (-1, *kernel)) if kernel else a)
        tensors[key_b] = _own(b.reshape(*b.shape, *(1 for _ in kernel)))
    if problems:
        raise InputError(problems)
    return tensors | _fused(adapter, experts)


def _fused(adapter: Adapter, experts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return PEFT's tensors of parameters that hold experts, who share one rank there."""
    layouts = {module: adapter.layouts[module] for module in experts}
    parameters = parameters_of(layouts)
    tensors: dict[str, Tensor] = {}
    for parameter, wrapper in wrapper_paths(parameters).items():
        places = {module: place_of(layouts[module]) for module in parameters[parameter]}
        _, count = next(iter(places.values()))
        both = stacked({expert: experts[m] for m, (expert, _) in places.items()}, count)
        tensors |= dict(zip(tensor_keys(wrapper, None), map(_own, both), strict=True))
    return tensors


def as_stored(adapter: Adapter) -> Adapter:
    """Return the adapter as it is when it was written in its own dtype and read again."""
    stored = {m: rounded(f, adapter.dtype) for m, f in adapter.modules.items()}
    modules = {m: LoRAFactors(a.float(), b.float()) for m, (a, b, _) in stored.items()}
    return replace(adapter, modules=modules)


def rounded(factors: LoRAFactors, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return `(a, b)` in the file's element type, and the relative error that this causes.

    A small weight times B can fall below what half precision holds with all its digits. Then every
    rank's row of A and column of B trade a power of two, which changes nothing else.
    """
    a, b = factors.a.to(dtype), factors.b.to(dtype)
    error = lost(factors, a, b)
    if error <= HALF_LIMIT * torch.finfo(dtype).eps:
        return a, b, error
    row, column = factors.a.abs().amax(1), factors.b.abs().amax(0)
    both = (row > 0) & (column > 0)
    apart = torch.where(both, column.log2() - row.log2(), 0.0)
    power = torch.exp2((apart / 2).round())
    a, b = (factors.a * power[:, None]).to(dtype), (factors.b / power).to(dtype)
    return a, b, lost(factors, a, b)


def lost(factors: LoRAFactors, a: Tensor, b: Tensor) -> float:
    """Return the relative error of the delta that rounded factors stand for."""
    length = norm(factors.b, factors.a)
    error = norm(torch.cat([factors.b, -b.float()], 1), torch.cat([factors.a, a.float()]))
    return error / length if length else 0.0


def _config(adapter: Adapter, modules: Mapping[str, LoRAFactors]) -> dict[str, Any]:
    # The largest rank leads: servers size their buffers by r and ignore rank_pattern.
    r = max((factors.rank for factors in modules.values()), default=1)
    ranks: dict[str, int] = {}
    for module, factors in modules.items():
        path = matched_path(module, adapter.layouts.get(module))
        ranks[path] = max(factors.rank, ranks.get(path, 0))
    # PEFT matches `(.*\\.)?(KEY)$` and takes the first key that fits. The anchor makes a key fit
    # its own module only, so the order of the keys does not matter.
    ranks = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    plain = {m: f for m, f in modules.items() if not is_expert(adapter.layouts.get(m))}
    parameters = parameters_of({m: adapter.layouts[m] for m in modules.keys() - plain.keys()})
    task, layers = adapter.config.get("task_type"), _declared(adapter)
    has_class = model_class(adapter.config)
    return {
        **({"auto_mapping": adapter.config["auto_mapping"]} if has_class else {}),
        "peft_type": "LORA",
        "task_type": task if layers or task not in TASKS_WITH_HEADS else None,
        "base_model_name_or_path": adapter.base_model,
        "revision": known_revision(adapter.config),
        "r": r,
        "lora_alpha": r,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "target_modules": _targets(adapter, plain),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "fan_in_fan_out": bool(adapter.config.get("fan_in_fan_out")),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": layers or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _declared(adapter: Adapter) -> list[str]:
    """Return the config's `modules_to_save` as far as the adapter has such full tensors."""
    names = adapter.config.get("modules_to_save") or []
    return sorted(name for name in names if any(is_saved(t, [name]) for t in adapter.saved_modules))


def _targets(adapter: Adapter, modules: Mapping[str, LoRAFactors]) -> list[str]:
    """Return the inputs' short names if they select exactly `modules`, else all full paths."""
    names = frozenset(plain_names(adapter.config) or ())
    all_plain = [m for m in adapter.modules if not is_expert(adapter.layouts.get(m))]
    complete = len(modules) == len(all_plain) and not any(find_gaps(modules))
    if names and complete and all(covered(module, names) for module in modules):
        return sorted(names)
    return sorted(modules)
