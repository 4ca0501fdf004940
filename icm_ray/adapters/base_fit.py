"""Does an adapter fit this base model? Asked of its architecture, or answered by loading it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from icm_ray.adapters.base_folder import BaseFolder, named, open_base, require_weights
from icm_ray.adapters.base_skeleton import build, model_classes
from icm_ray.adapters.contents import EMBEDDING
from icm_ray.adapters.peft_format import AdapterFile
from icm_ray.adapters.policy import short
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

    Only the base's config and its weights' headers are read; the architecture is built without
    weights.

    Args:
        adapters: Adapters or opened files.
        base_path: A local transformers model folder.

    Raises:
        InputError: the base cannot be used, or naming every module that does not fit.
    """
    base = open_base(Path(base_path))
    built: dict[Any, nn.Module] = {}
    problems = []
    for adapter in adapters:
        misfits = []
        for kind in _classes(base, adapter):
            if kind not in built:
                built[kind] = build(base, kind)
            misfits.append(_misfits(adapter, built[kind]))
        # The class with the fewest misfits is the one the adapter was trained on.
        problems += [f"{adapter.name}: {line}" for line in min(misfits, key=len)]
    if problems:
        raise InputError(problems)


def load_base(path: Path, adapter: Adapter) -> Any:
    """Return the base in float32, as the transformers class that has all of the adapter's modules.

    Raises:
        InputError: the base cannot be loaded, or no class of it has these modules.
    """
    base = open_base(path)
    require_weights(base)
    for kind in _classes(base, adapter):
        model: Any = build(base, kind)
        if adapter.modules.keys() <= {name for name, _ in model.named_modules()}:
            with named(path, "no loadable base model"):
                return (
                    type(model)
                    .from_pretrained(
                        path, local_files_only=True, use_safetensors=True, dtype=torch.float32
                    )
                    .eval()
                )
    raise InputError(
        f"{path}: lacks modules of the adapter but all are expected. Check that it is its base."
    )


def _classes(base: BaseFolder, adapter: Adapter | AdapterFile) -> list[Any]:
    """Return what the base may be: its task's class, its own, and the bare model.

    Raises:
        InputError: transformers has none of them for this kind of model.
    """
    import transformers

    task = _HEADS.get(str(adapter.config.get("task_type")))
    auto = [getattr(transformers, name) for name in (task, "AutoModel") if name]
    heads = [kind for kind in auto if type(base.config) in kind._model_mapping]
    bare = [kind for kind in heads if kind is transformers.AutoModel]
    classes = [*(kind for kind in heads if kind not in bare), *model_classes(base), *bare]
    if not classes:
        raise InputError(
            f"{base.config_file}: model_type: {short(base.config.model_type)} but a kind that "
            "transformers has a model for is expected. Check the base model."
        )
    return list(dict.fromkeys(classes))


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
