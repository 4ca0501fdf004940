"""What PEFT makes of a folder: the proof that it holds a change, not given by our reader."""

import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from icm_ray.adapters.contents import EMBEDDING, PREFIX, kernel_of
from icm_ray.adapters.fused import (
    ORDER,
    is_expert,
    matched_path,
    parameters_of,
    place_of,
    weightless,
    wrapper_paths,
)
from icm_ray.adapters.peft_format import AdapterFile
from icm_ray.adapters.policy import NEVER_RUN
from icm_ray.adapters.verify import PROBES, judged, relative_error, reopened
from icm_ray.errors import InputError
from icm_ray.types import Adapter, LoRAFactors


def verify_with_peft(folder: str | Path, expected: Adapter) -> dict[str, float]:
    """Load `folder` with PEFT into a weightless skeleton and compare as `verify_written` does.

    Raises:
        InputError: naming every module that is missing, unexpected, ignored by PEFT or different.
    """
    file, wanted = reopened(folder, expected)
    layers = _lora_layers(load_with_peft(_skeleton(expected), file))
    wrappers = wrapper_paths(parameters_of({m: file.layouts.get(m, "") for m in wanted}))
    errors: dict[str, float] = {}
    ignored = []
    for seed, module in enumerate(wanted):
        layout = expected.layouts.get(module)
        path = matched_path(module, layout)
        path = wrappers.get(path, path)
        if path not in layers:
            ignored.append(f"{module}: ignored by PEFT but expected")
            continue
        generator = torch.Generator().manual_seed(seed)
        errors[module] = _layer_error(layers[path], expected.modules[module], layout, generator)
    return judged(file, errors, "PEFT computes another change", ignored)


def load_with_peft(model: nn.Module, file: AdapterFile) -> Any:
    """Return `model` wrapped by PEFT with an adapter in a folder.

    Raises:
        InputError: PEFT cannot load the folder, or would run a pattern that no merge writes.
    """
    from peft import PeftConfig, PeftModel

    folder = file.path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = PeftConfig.from_pretrained(str(folder))
            _refuse_patterns(config, folder)
            config.task_type = None  # else PEFT wraps the model for its task and asks for more
            config.modules_to_save = None  # they are compared, or laid over the model, by us
            # low_cpu_mem_usage: the factors come from the file, so none are drawn first.
            options: dict[str, Any] = {"low_cpu_mem_usage": True, "ignore_mismatched_sizes": True}
            loaded = PeftModel.from_pretrained(model, str(folder), config=config, **options).eval()
    except InputError:
        raise
    except Exception as error:  # PEFT raises whatever its loader runs into
        raise InputError(
            f"{folder}: PEFT cannot load it ({type(error).__name__}: {error}). Save it again."
        ) from error
    _clear(loaded, file.shapes)
    return loaded


def _clear(model: nn.Module, modules: Collection[str]) -> None:
    """Zero the factors of layers that names such as `q_proj` select and the file does not fill.

    PEFT's usual way of loading makes no change of them; `low_cpu_mem_usage` leaves them without
    values.
    """
    for name, layer in _lora_layers(model).items():
        if name in modules or "base_layer" in name:
            continue
        if any(module.startswith(f"{name}.") for module in modules):  # of experts in one parameter
            continue
        for linears in (layer.lora_A, layer.lora_B):
            for linear in linears.values():
                linear.to_empty(device="cpu").weight.data.zero_()
        for embeddings in (layer.lora_embedding_A, layer.lora_embedding_B):
            for key, factor in embeddings.items():
                embeddings[key] = nn.Parameter(torch.zeros_like(factor, device="cpu"))


def _refuse_patterns(config: Any, folder: Path) -> None:
    """Refuse regular expressions that PEFT would run against every module, maybe for ever."""
    for key in NEVER_RUN:
        if isinstance(getattr(config, key), str):
            raise InputError(
                f"{folder}: {key}: a regular expression but a list of names is expected, as merges "
                "are written. Merge again."
            )


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    return {name.removeprefix(PREFIX): layer for name, layer in layers.items()}


def _skeleton(expected: Adapter) -> nn.Module:
    """Return a model with exactly the adapter's modules and next to no memory."""
    root = nn.Module()
    parameters = parameters_of(expected.layouts)
    for module, factors in expected.modules.items():
        if not is_expert(layout := expected.layouts.get(module)):
            owner, _, leaf = module.rpartition(".")
            _inside(root, owner).add_module(leaf, _weightless(factors.shape, layout))
    for parameter in sorted(parameters, key=_place_in_owner):
        experts = parameters[parameter]
        owner, _, leaf = parameter.rpartition(".")
        _, count = place_of(expected.layouts[experts[0]])
        weight = weightless(expected.modules[experts[0]].shape, count)
        _inside(root, owner).register_parameter(leaf, weight)
    return root


def _inside(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, made if it is not there."""
    at = root
    for name in path.split(".") if path else ():
        if name not in at._modules:
            at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    return at


def _place_in_owner(parameter: str) -> int:
    name = parameter.rpartition(".")[2]
    return ORDER.index(name) if name in ORDER else 0


def _weightless(shape: tuple[int, int], layout: str | None) -> nn.Module:
    d_out, d_in = shape
    if layout is None:
        layer: Any = nn.Linear(d_in, d_out, bias=False, device="meta")
    elif layout == EMBEDDING:
        layer = nn.Embedding(d_in, d_out, device="meta")
    else:
        kernel = kernel_of(layout)
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        layer = conv(d_in // math.prod(kernel), d_out, kernel, bias=False, device="meta")
    # One zero seen as a whole matrix. PEFT would send an embedding's factors to the meta device
    # after its base, and there their values are lost.
    layer.weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
    return layer


def _layer_error(
    layer: Any, factors: LoRAFactors, layout: str | None, generator: torch.Generator
) -> float:
    """Return the relative error of PEFT's own B(A(x)) * scaling on random inputs."""
    name, d_in = "default", factors.shape[1]
    scaling = layer.scaling[name]
    with torch.no_grad():
        if layout is not None and is_expert(layout):
            expert, _ = place_of(layout)
            x = torch.randn(PROBES, d_in, generator=generator)
            up, down, scaling = layer.get_delta_factors(name)
            theirs = x @ down[expert].float().T @ up[expert].float().T * scaling
            ours = x @ factors.a.T @ factors.b.T
        elif layout == EMBEDDING:
            tokens = torch.randint(d_in, (PROBES,), generator=generator)
            a, b = (
                layer.lora_embedding_A[name].float(),
                layer.lora_embedding_B[name].float(),
            )
            theirs = functional.embedding(tokens, a.T) @ b.T * scaling
            ours = factors.a[:, tokens].T @ factors.b.T
        else:
            x = torch.randn(PROBES, d_in, generator=generator)
            down = layer.lora_A[name].float()
            kernel = down.weight.shape[1:]
            hidden = down(x.unflatten(1, kernel))
            theirs = (layer.lora_B[name].float()(hidden) * scaling).flatten(1)
            ours = x @ factors.a.T @ factors.b.T
    return relative_error(theirs, ours)
