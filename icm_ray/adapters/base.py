"""The base model of an adapter: its architecture without weights, or the real thing."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from icm_ray.adapters.contents import EMBEDDING
from icm_ray.adapters.peft_format import AdapterFile
from icm_ray.errors import InputError
from icm_ray.types import Adapter

_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def check_base(adapters: Sequence[Adapter | AdapterFile], base_path: str | Path) -> None:
    """Check that a base model has every module of the adapters, in their shape.

    Only the base's `config.json` is read; the architecture is built without weights.

    Args:
        adapters: Adapters or opened files.
        base_path: A local transformers model folder.

    Raises:
        InputError: the config cannot be used, or naming every module that does not fit.
    """
    problems = []
    for adapter in adapters:
        found = [_misfits(adapter, model) for model in _architectures(Path(base_path), adapter)]
        # The class with the fewest misfits is the one the adapter was trained on.
        problems += [f"{adapter.name}: {line}" for line in min(found, key=len)]
    if problems:
        raise InputError(problems)


def architecture(path: Path, adapter: Adapter | AdapterFile) -> Any:
    """Return the base without weights, as the class that has most of the adapter's modules.

    Raises:
        InputError: the base's config cannot be used.
    """
    return max(
        _architectures(path, adapter),
        key=lambda model: sum(name in adapter.modules for name, _ in model.named_modules()),
    )


def tied_warnings(
    adapters: Sequence[Adapter | AdapterFile], base_path: Path | None = None
) -> list[str]:
    """Say if adapters change one of two layers that the base may keep as one weight.

    Loaded beside the base such an adapter changes one of them, merged into it both.

    Args:
        adapters: Adapters or opened files.
        base_path: The base's folder; without it, whether the layers are tied is not known.

    Returns:
        One line for all adapters, or none.
    """
    changed: dict[str, str] = {}
    for adapter in adapters:
        modules = [
            module
            for module in adapter.modules
            if adapter.layouts.get(module) == EMBEDDING or module.rpartition(".")[2] == "lm_head"
        ]
        if modules and base_path is not None:
            ties = architecture(base_path, adapter).all_tied_weights_keys or {}
            weights = {*ties, *ties.values()}
            modules = [module for module in modules if f"{module}.weight" in weights]
        if modules:
            changed[adapter.name] = modules[0]
    if not changed:
        return []
    name, module = next(iter(changed.items()))
    others = f" (and in {len(changed) - 1} others)" if len(changed) > 1 else ""
    return [
        f"{name}: {module}{others}: {'' if base_path else 'if '}the base ties its embeddings: "
        "loaded, the adapter changes one of them; merged by PEFT, both. icm-ray export unties them."
    ]


def load_base(path: Path, adapter: Adapter) -> Any:
    """Return the base in float32, as the transformers class that has all of the adapter's modules.

    Raises:
        InputError: the base cannot be loaded, or no class of it has these modules.
    """
    for model in _architectures(path, adapter):
        if adapter.modules.keys() <= {name for name, _ in model.named_modules()}:
            try:
                return (
                    type(model)
                    .from_pretrained(
                        path, local_files_only=True, use_safetensors=True, dtype=torch.float32
                    )
                    .eval()
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise _unusable(path, error) from error
    raise InputError(
        f"{path}: lacks modules of the adapter but all are expected. Check that it is its base."
    )


def _architectures(path: Path, adapter: Adapter | AdapterFile) -> Iterator[Any]:
    """Yield the base without weights: as its task's class, as its own, and without a head."""
    import transformers

    try:
        # trust_remote_code must be said: left open, transformers asks on the terminal.
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    task = _HEADS.get(str(adapter.config.get("task_type")))
    for name in dict.fromkeys([task, *(config.architectures or []), "AutoModel"]):
        known = getattr(transformers, str(name), None)
        if known is None:
            continue
        build = known.from_config if hasattr(known, "from_config") else known
        try:
            with torch.device("meta"):
                model = build(config)
        except ValueError as error:  # no such head for this kind of model
            if name == "AutoModel":
                raise _unusable(path, error) from error
            continue
        yield model


def _unusable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: cannot be loaded ({error}) but a local transformers model with safetensors is "
        "expected. Check the base model."
    )


def _misfits(adapter: Adapter | AdapterFile, model: nn.Module) -> list[str]:
    layers = dict(model.named_modules())
    shapes = (
        {module: shape[:2] for module, shape in adapter.shapes.items()}
        if isinstance(adapter, AdapterFile)
        else {module: factors.shape for module, factors in adapter.modules.items()}
    )
    lines = []
    for module, shape in shapes.items():
        weight = getattr(layers.get(module), "weight", None)
        if weight is None and (fused := _fused_experts(layers, module)):
            lines.append(
                f"{module}: {fused} holds all experts in one parameter but a module of its own is "
                "expected. Leave base out: merging and checking the file need none."
            )
            continue
        if weight is None:
            lines.append(f"{module}: not in the base model but expected. Check the base.")
            continue
        is_turned = adapter.layouts.get(module) == EMBEDDING or "Conv1D" in str(
            type(layers[module])
        )
        size = (weight.shape[0], math.prod(weight.shape[1:]))
        expected = size[::-1] if is_turned else size
        if shape != expected:
            lines.append(
                f"{module}: {shape[0]} x {shape[1]} but the base's {expected[0]} x {expected[1]} "
                "is expected. Check the base."
            )
    return lines


def _fused_experts(layers: dict[str, nn.Module], module: str) -> str | None:
    """Return the module's nearest parent in the base if that is a mixture's fused experts."""
    parent = module
    while parent not in layers:
        parent = parent.rpartition(".")[0]
    own = layers[parent].parameters(recurse=False)
    return parent if any(parameter.ndim == 3 for parameter in own) else None
