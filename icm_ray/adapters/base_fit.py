"""Does an adapter fit this base model? Asked of its architecture, or answered by loading it."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from icm_ray.adapters.base_folder import BaseFolder, named, open_base, require_weights
from icm_ray.adapters.base_skeleton import (
    SAFELY,
    build,
    class_named,
    is_finite,
    model_classes,
    run_as_stored,
)
from icm_ray.adapters.config_keys import TASKS_WITH_HEADS, model_class
from icm_ray.adapters.contents import EMBEDDING
from icm_ray.adapters.fused import find_parameter, is_expert, matched_path, place_of
from icm_ray.adapters.gaps import covered, plain_names
from icm_ray.adapters.peft_format import AdapterFile
from icm_ray.adapters.policy import short
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

    Only the base's config and its weights' headers are read; the architecture is built without
    weights.

    Args:
        adapters: Adapters or opened files.
        base_path: A local transformers model folder.

    Raises:
        InputError: the base cannot be used, or naming every module that does not fit.
    """
    refuse_misfits(adapters, open_base(Path(base_path)))


def refuse_misfits(adapters: Iterable[Adapter | AdapterFile], base: BaseFolder) -> None:
    """Raise InputError, naming every module, unless a checked base has all of the adapters'."""
    problems = []
    for adapter in adapters:
        problems += [f"{adapter.name}: {line}" for line in by_cause(misfits(adapter, base))]
    if problems:
        raise InputError(problems)


def architecture(base: BaseFolder, adapter: Adapter | AdapterFile) -> Any:
    """Return the base without weights, as the class that fits the adapter best.

    Raises:
        InputError: the base's config makes no model.
    """
    return _fit(adapter, base)[0]


def exactly_targeted(adapter: Adapter, base: BaseFolder) -> Adapter:
    """Return an adapter whose config selects no module of its base but those it changes.

    Short names such as `q_proj` may be those of another part of the model, a vision tower, too:
    PEFT would add to it what no file fills.
    """
    if not (names := plain_names(adapter.config)):
        return adapter
    others = (m for m, _ in architecture(base, adapter).named_modules() if m not in adapter.modules)
    if not any(covered(module, names) for module in others):
        return adapter
    config = {key: value for key, value in adapter.config.items() if key != "target_modules"}
    return replace(adapter, config=config)


def tied_warnings(
    adapters: Sequence[Adapter | AdapterFile], base: BaseFolder | None = None
) -> list[str]:
    """Say if adapters change one of two layers that the base may keep as one weight.

    Loaded beside the base such an adapter changes one of them, merged into it both.

    Args:
        adapters: Adapters or opened files.
        base: The checked base; without it, whether the layers are tied is not known.

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
        if modules and base is not None:
            ties = architecture(base, adapter).all_tied_weights_keys or {}
            weights = {*ties, *ties.values()}
            modules = [module for module in modules if f"{module}.weight" in weights]
        if modules:
            changed[adapter.name] = modules[0]
    if not changed:
        return []
    name, module = next(iter(changed.items()))
    others = f" (and in {len(changed) - 1} others)" if len(changed) > 1 else ""
    return [
        f"{name}: {module}{others}: {'' if base else 'if '}the base ties its embeddings: "
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
    base = open_base(path)
    require_weights(base)
    for kind in _classes(base, adapter):
        model: Any = build(base, kind)
        paths = {matched_path(m, adapter.layouts.get(m)) for m in adapter.modules}
        known = {name for name, _ in model.named_modules()}
        if paths <= known | {name for name, one in model.named_parameters() if one.ndim > 1}:
            return _loaded(path, type(model))
    raise InputError(
        f"{path}: lacks modules of the adapter but all are expected. Check that it is its base."
    )


def _loaded(path: Path, kind: Any) -> Any:
    options = {"dtype": torch.float32, "device_map": {"": "cpu"}, **SAFELY}
    with named(path, "no loadable base model"):
        model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    run_as_stored(model)
    bad = [name for name, weight in model.named_parameters() if not is_finite(weight.detach())]
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


def _classes(base: BaseFolder, adapter: Adapter | AdapterFile) -> list[Any]:
    """Return what the base may be: its task's class, its own, the bare model, one with a head.

    Raises:
        InputError: transformers has none of them for this kind of model.
    """
    own = class_of(adapter.config)
    tasks = [] if own else [TASK_CLASSES[task] for task in TASKS_WITH_HEADS]
    is_auto = own in TASK_CLASSES.values()
    first = _auto_classes(base, [own]) if is_auto else [own and class_named(base, own)]
    kinds = [*first, *model_classes(base), *_auto_classes(base, ["AutoModel", *tasks])]
    classes = [kind for kind in dict.fromkeys(kinds) if kind]
    if not classes:
        raise InputError(
            f"{base.config_file}: model_type: {short(base.config.model_type)} but a kind that "
            "transformers has a model for is expected. Check the base model."
        )
    return classes


def _auto_classes(base: BaseFolder, names: Iterable[str | None]) -> list[Any]:
    """Return those of transformers' auto classes that have a model of this kind."""
    import transformers

    kinds = [getattr(transformers, str(name)) for name in names]
    return [kind for kind in kinds if type(base.config) in kind._model_mapping]


def misfits(adapter: Adapter | AdapterFile, base: BaseFolder) -> list[tuple[str, str]]:
    """Return modules that do not fit into the base's class that fits best, and why.

    Raises:
        InputError: the base's config cannot be used.
    """
    return _fit(adapter, base)[1]


def _fit(
    adapter: Adapter | AdapterFile, base: BaseFolder
) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Return the first class without weights that fits, or that with the fewest misfits."""
    tried = []
    for kind in _classes(base, adapter):
        model = build(base, kind)
        tried.append((model, _misfits_of(adapter, model)))
        if not tried[-1][1]:
            return tried[-1]
    return min(tried, key=lambda one: len(one[1]))


def _misfits_of(adapter: Adapter | AdapterFile, model: nn.Module) -> list[tuple[str, str]]:
    layers = dict(model.named_modules())
    shapes = (
        {module: shape[:2] for module, shape in adapter.shapes.items()}
        if isinstance(adapter, AdapterFile)
        else {module: factors.shape for module, factors in adapter.modules.items()}
    )
    wrong = []
    for module, shape in shapes.items():
        layout = adapter.layouts.get(module)
        if layout is not None and is_expert(layout):
            wrong += _expert_misfit(layers, module, (*shape, layout))
            continue
        weight = getattr(layers.get(module), "weight", None)
        if weight is None and (fused := _fused_experts(layers, module)):
            advice = "Leave base out: merging and checking the file need none."
            holds = f"{fused} holds all experts in one parameter but a module of its own"
            wrong.append((module, f"{holds} is expected. {advice}"))
        elif weight is None:
            wrong.append((module, "not in the base model but expected. Check the base."))
        else:
            is_turned = layout == EMBEDDING or "Conv1D" in str(type(layers[module]))
            size = (weight.shape[0], math.prod(weight.shape[1:]))
            expected = size[::-1] if is_turned else size
            if shape != expected:
                sizes = f"{shape[0]} x {shape[1]} but the base's {expected[0]} x {expected[1]}"
                wrong.append((module, f"{sizes} is expected. Check the base."))
    return wrong


def _expert_misfit(
    layers: Mapping[str, nn.Module], module: str, wanted: tuple[int, int, str]
) -> list[tuple[str, str]]:
    """Return what is wrong with an expert's place in the base, or nothing."""
    place = find_parameter(layers, module)
    if place is None:
        return [
            (module, "no such parameter in the base model but one is expected. Check the base.")
        ]
    parameter, is_turned = place
    *size, layout = wanted
    _, experts = place_of(layout)
    found = tuple(parameter.shape) if parameter.ndim == 3 else (1, *parameter.shape)
    if found == (experts, *(size[::-1] if is_turned else size)):
        return []
    sizes = f"{experts} experts of {size[0]} x {size[1]} but the base's {short(parameter.shape)}"
    return [(module, f"{sizes} is expected. Check the base.")]


def _fused_experts(layers: dict[str, nn.Module], module: str) -> str | None:
    """Return the module's nearest parent in the base if that is a mixture's fused experts."""
    parent = module
    while parent not in layers:
        parent = parent.rpartition(".")[0]
    own = layers[parent].parameters(recurse=False)
    return parent if any(parameter.ndim == 3 for parameter in own) else None
