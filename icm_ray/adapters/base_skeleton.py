"""A base model before its weights are loaded: what it may be, and what its files lack or break.

transformers calls whatever attribute of its own a config names; here only model classes of the
config's own kind are fetched, and none is built without bounds.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from icm_ray.adapters.base_folder import CONFIG_FILE, BaseFolder, named
from icm_ray.adapters.policy import short
from icm_ray.errors import InputError

SAFELY = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
"""How transformers may read a stranger's folder."""
MAX_MODULES = 50_000
"""Modules of one model: the largest known has 2,000, and ten seconds build 50,000."""


def model_classes(base: BaseFolder) -> list[Any]:
    """Return the model classes that the config's `architectures` names.

    They are looked for in transformers' tables and beside the first of its classes for this kind
    of model, so nothing else it has is ever fetched. A name that it does not know at all is a
    stranger's own class, whose code is never run; the bare model stands in for it.

    Raises:
        InputError: a name is something of transformers that is no class of this kind of model.
    """
    import transformers

    classes, problems = [], []
    for name in base.config.architectures or []:
        if known := class_named(base, name):
            classes.append(known)
        elif name in dir(transformers):
            problems.append(
                f"{base.config_file}: architectures: {short(name)} but a model class of "
                f"{short(base.config.model_type)} is expected. Correct it, or download it again."
            )
    if problems:
        raise InputError(problems)
    return classes


def class_named(base: BaseFolder, name: str) -> Any:
    """Return transformers' model class of this kind of model with that name, or None."""
    import transformers

    own = _own_names(base.config)
    beside = sys.modules[getattr(transformers, own[0]).__module__] if own else None
    known = getattr(transformers if name in own else beside, name, None)
    is_model = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    return known if is_model else None


def own_class(config: Any) -> Any:
    """Return what to load a folder with: language models keep their head, others are bare."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    if is_image_text(config):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if is_language_model(config) else AutoModel


def is_language_model(config: Any) -> bool:
    """Say whether the saved model has the head of a language model."""
    return is_image_text(config) or _saved_as(config).endswith(("ForCausalLM", "LMHeadModel"))


def is_image_text(config: Any) -> bool:
    """Say whether the saved model is a decoder of texts that images may stand in."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return known == _saved_as(config) and not config.is_encoder_decoder


def _saved_as(config: Any) -> str:
    return str((config.architectures or [""])[0])


def build(base: BaseFolder, model_class: Any) -> nn.Module:
    """Return a model without weights; the same one when it is asked for again.

    Args:
        base: The checked folder.
        model_class: One of `model_classes`, or an auto class.

    Raises:
        InputError: the config makes no such model, or one of more than `MAX_MODULES`.
    """
    if model_class not in base.skeletons:
        make = getattr(model_class, "from_config", model_class)
        with named(base.config_file, "no config of a model"), _bounded(base), torch.device("meta"):
            base.skeletons[model_class] = make(base.config)
    return base.skeletons[model_class]


def missing_lines(path: Path, absent: list[str]) -> list[str]:
    """Return the warning about weights that a base's files lack, if there are any."""
    if not absent:
        return []
    others = f" and {len(absent) - 1} others" if absent[1:] else ""
    return [f"{path}: {absent[0]}{others}: not among the weights, so random numbers stand in."]


def missing_weights(base: BaseFolder) -> list[str]:
    """Return the weights that the model has and the files lack, sorted; no value is read.

    Raises:
        InputError: weights have another shape than the config says, or the config makes no model.
    """
    with named(base.path, "no loadable base model"), _bounded(base), silent():
        _, loading = own_class(base.config).from_pretrained(
            base.path,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **SAFELY,
        )
    problems = [
        f"{base.path}: {name}: {short(tuple(stored))} but {short(tuple(wanted))} is expected, as "
        f"{CONFIG_FILE} says. Download the base again."
        for name, stored, wanted in sorted(loading["mismatched_keys"])
    ]
    if problems:
        raise InputError(problems)
    return sorted(loading["missing_keys"])


def run_as_stored(model: Any) -> None:
    """Keep bitsandbytes from packing weights of 4 bits anew, as it does in place in a first pass.

    It would where a processor has bfloat16, with scales in bfloat16: other numbers than elsewhere,
    and an error for layers of a width that it cannot pack.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_finite(tensor: Tensor) -> bool:
    """Say whether no number is NaN or infinite, without a copy; only plain floats are looked at."""
    if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
        return True
    return all(math.isfinite(float(edge)) for edge in tensor.aminmax())


def _own_names(config: Any) -> list[str]:
    """Return the classes that transformers' own tables have for this kind of model."""
    from transformers.models.auto import modeling_auto

    names: list[str] = []
    for table, classes in vars(modeling_auto).items():
        if table.startswith("MODEL_") and table.endswith("MAPPING_NAMES"):
            listed = classes.get(config.model_type, [])
            names += [listed] if isinstance(listed, str) else listed
    return names


@contextlib.contextmanager
def _bounded(base: BaseFolder) -> Iterator[None]:
    """Stop the building of a model that has more than `MAX_MODULES`."""
    count = 0

    def watch(_module: nn.Module, _name: str, _submodule: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise InputError(
                f"{base.config_file}: over {MAX_MODULES} modules but fewer are expected. Check "
                "its numbers of layers."
            )

    handle = register_module_module_registration_hook(watch)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep transformers from reporting on its own what is reported here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
