"""Which modules of a base adapters are trained on: those a recipe names, else PEFT's own."""

from pathlib import Path
from typing import Any

from torch import nn

from icm_ray.adapters.base_folder import open_base
from icm_ray.adapters.base_skeleton import build, own_class
from icm_ray.adapters.blocks import ends_in
from icm_ray.config import LoRARecipe
from icm_ray.errors import RecipeError, did_you_mean


def with_targets(lora: LoRARecipe, base: Path, *, shared: bool = False) -> LoRARecipe:
    """Return a recipe of adapters that names its targets, after a look at the base's modules.

    Args:
        lora: What a recipe says.
        base: The base's folder; its weights are not read.
        shared: Whether several adapters are to run in one forward pass.

    Raises:
        RecipeError: PEFT has no targets of its own for the model's type, the base lacks some, or
            adapters cannot be trained on them, together if need be.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OWN

    opened = open_base(base)
    model = build(opened, own_class(opened.config))
    _check_known(lora, model, OWN)
    config = LoraConfig(r=lora.rank, target_modules=lora.targets)
    try:
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise RecipeError(f"lora.targets: {reason}. Name linear layers of the base.") from None
    layers = {path: part for path, part in model.named_modules() if isinstance(part, LoraLayer)}
    alone = [path for path, part in layers.items() if type(part) is not Linear]
    if shared and alone:
        raise RecipeError(
            f"training.tasks_per_forward: {alone[0]} is no linear layer, so adapters on it are "
            "trained alone. Set it to 1, or leave the layer out of lora.targets."
        )
    found: Any = config.target_modules
    resolved = sorted(found) if isinstance(found, set) else found
    return lora if lora.targets is not None else lora.model_copy(update={"targets": resolved})


def _check_known(lora: LoRARecipe, model: nn.Module, own: Any) -> None:
    paths = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    ends = sorted({path.rpartition(".")[2] for path in paths})
    kind = model.config.model_type  # type: ignore[union-attr]
    if lora.targets is None and kind not in own:
        raise RecipeError(
            f"lora.targets: left out, and PEFT has none of its own for a {kind}. Name some, for "
            f"example of {', '.join(ends)}."
        )
    every = [path for path, _ in model.named_modules()]
    named = lora.targets if isinstance(lora.targets, list) else []
    lost = [name for name in named if not any(ends_in(path, [name]) for path in every)]
    if lost:
        raise RecipeError(
            f"lora.targets: {name!r} is no module of the base.{did_you_mean(name, ends)}"
            for name in lost
        )
