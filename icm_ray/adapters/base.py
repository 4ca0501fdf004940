"""The base model of an adapter: its architecture without weights, or the real thing."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from icm_ray.adapters.config_keys import TASKS_WITH_HEADS, model_class
from icm_ray.adapters.contents import EMBEDDING
from icm_ray.adapters.peft_format import AdapterFile
from icm_ray.errors import InputError, by_cause
from icm_ray.types import Adapter

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def class_of(config: Mapping[str, Any]) -> str | None:
    """Return the class of transformers that an adapter's config says it was trained on."""
    return TASK_CLASSES.get(str(config.get("task_type"))) or model_class(config)


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
        problems += [f"{adapter.name}: {line}" for line in by_cause(misfits(adapter, base_path))]
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

    Weights that the base lacks, which transformers draws at random, are told through Python's
    `warnings`.

    Raises:
        InputError: the base cannot be loaded, holds NaN or infinity, or no class of it has these
            modules.
    """
    for model in _architectures(path, adapter):
        if adapter.modules.keys() <= {name for name, _ in model.named_modules()}:
            return _loaded(path, type(model))
    raise InputError(
        f"{path}: lacks modules of the adapter but all are expected. Check that it is its base."
    )


def _loaded(path: Path, kind: Any) -> Any:
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unusable(path, error) from error
    bad = [name for name, x in model.named_parameters() if not math.isfinite(_peak(x))]
    if bad:
        expected = "NaN or infinity but finite weights are expected. Download the base again."
        raise InputError(f"{path}: {line}" for line in by_cause((name, expected) for name in bad))
    if missing := sorted(info["missing_keys"]):
        warnings.warn(
            f"{path}: lacks {len(missing)} weights of {kind.__name__}, such as {missing[0]}; they "
            "are drawn at random, so only the adapter's change can be checked.",
            stacklevel=3,
        )
    return model.eval()


def _peak(values: torch.Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _architectures(path: Path, adapter: Adapter | AdapterFile) -> Iterator[Any]:
    """Yield the base without weights: as its task's class, as its own, without and with a head."""
    import transformers

    try:
        # trust_remote_code must be said: left open, transformers asks on the terminal.
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    own = class_of(adapter.config)
    heads = [] if own else [TASK_CLASSES[task] for task in TASKS_WITH_HEADS]
    for name in dict.fromkeys([own, *(config.architectures or []), "AutoModel", *heads]):
        known: Any = getattr(transformers, str(name), None)
        if name in TASK_CLASSES.values():
            build = known.from_config
        elif _is_model_of(known, config):
            build = known
        else:
            continue
        try:
            with torch.device("meta"):
                model = build(config)
        except ValueError as error:  # no such head for this kind of model
            if name == "AutoModel":
                raise _unusable(path, error) from error
            continue
        yield model


def _is_model_of(known: Any, config: Any) -> bool:
    """Say whether a name from a config is a model class for this config, and no other thing."""
    from transformers import PreTrainedModel

    is_model = isinstance(known, type) and issubclass(known, PreTrainedModel)
    return is_model and isinstance(config, known.config_class or ())


def _unusable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: cannot be loaded ({error}) but a local transformers model with safetensors is "
        "expected. Check the base model."
    )


def misfits(adapter: Adapter | AdapterFile, base_path: str | Path) -> list[tuple[str, str]]:
    """Return modules that do not fit into the base's class that fits best, and why.

    Raises:
        InputError: the base's config cannot be used.
    """
    fewest: list[tuple[str, str]] | None = None
    for model in _architectures(Path(base_path), adapter):
        wrong = _misfits_of(adapter, model)
        if fewest is None or len(wrong) < len(fewest):
            fewest = wrong
        if not fewest:
            break
    return fewest or []


def _misfits_of(adapter: Adapter | AdapterFile, model: nn.Module) -> list[tuple[str, str]]:
    layers = dict(model.named_modules())
    shapes = (
        {module: shape[:2] for module, shape in adapter.shapes.items()}
        if isinstance(adapter, AdapterFile)
        else {module: factors.shape for module, factors in adapter.modules.items()}
    )
    wrong = []
    for module, shape in shapes.items():
        weight = getattr(layers.get(module), "weight", None)
        if weight is None and (fused := _fused_experts(layers, module)):
            advice = "Leave base out: merging and checking the file need none."
            holds = (
                f"{fused} holds all experts in one parameter but a module of its own is expected"
            )
            wrong.append((module, f"{holds} is expected. {advice}"))
        elif weight is None:
            wrong.append((module, "not in the base model but expected. Check the base."))
        else:
            is_turned = adapter.layouts.get(module) == EMBEDDING or "Conv1D" in str(
                type(layers[module])
            )
            size = (weight.shape[0], math.prod(weight.shape[1:]))
            expected = size[::-1] if is_turned else size
            if shape != expected:
                sizes = f"{shape[0]} x {shape[1]} but the base's {expected[0]} x {expected[1]}"
                wrong.append((module, f"{sizes} is expected. Check the base."))
    return wrong


def _fused_experts(layers: dict[str, nn.Module], module: str) -> str | None:
    """Return the module's nearest parent in the base if that is a mixture's fused experts."""
    parent = module
    while parent not in layers:
        parent = parent.rpartition(".")[0]
    own = layers[parent].parameters(recurse=False)
    return parent if any(parameter.ndim == 3 for parameter in own) else None
