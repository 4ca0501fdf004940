"""Proof on the real base model: PEFT's outputs equal the base plus the expected change."""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from icm_ray.adapters.base_fit import load_base
from icm_ray.adapters.base_folder import named
from icm_ray.adapters.contents import EMBEDDING
from icm_ray.adapters.fused import expert_slice, find_parameter, is_expert, parameters_of
from icm_ray.adapters.peft_format import open_adapter
from icm_ray.adapters.peft_reading import load_with_peft
from icm_ray.adapters.verify import TOLERANCES, relative_error
from icm_ray.errors import InputError
from icm_ray.types import Adapter, LoRAFactors


def verify_forward(
    folder: str | Path, expected: Adapter, base_path: str | Path
) -> dict[str, float]:
    """Run the real base with the folder in PEFT, and with hooks that add the expected change.

    Args:
        folder: A PEFT adapter folder.
        expected: The change it should hold.
        base_path: A local transformers model; nothing is downloaded.

    Returns:
        `relative_error` of PEFT to the hooks, and `change_from_base`, both relative Frobenius.

    Raises:
        InputError: the base cannot be loaded or lacks a module, or the outputs do not agree.
    """
    file = open_adapter(folder, expected.name, saved_modules="keep")
    model = load_base(Path(base_path), expected)
    _lay_over(model, expected.saved_modules)
    with named(Path(base_path), "a base that does not run"):
        inputs = _random_inputs(model)
        plain = _output(model, inputs)
    if not torch.isfinite(plain).all():
        raise InputError(
            f"{base_path}: outputs are NaN or infinite but finite ones are expected. Check the "
            "base's weights."
        )
    with _added(model, expected) as reached:
        algebra = _output(model, inputs)
    theirs = _output(load_with_peft(model, file), inputs)
    error = relative_error(theirs, algebra)
    change = relative_error(theirs, plain)
    # Rounding errors grow on their way through the layers.
    tolerance = 10 * TOLERANCES[file.dtype]
    if not error <= tolerance:
        raise InputError(
            f"{folder}: outputs differ by {error:.1e} from the expected change but at most "
            f"{tolerance:.1e} is expected. Save it again."
        )
    is_zero = not any(f.a.any() and f.b.any() for f in expected.modules.values())
    if not reached and not is_zero:
        raise InputError(
            f"{folder}: {next(iter(expected.modules))}: no inputs of the check reach it or another "
            "adapted module. Check this adapter without its base."
        )
    if change == 0 and not is_zero:
        raise InputError(
            f"{folder}: the base's outputs stay as they are but a change is expected. "
            "Check that this is the adapter's base model."
        )
    return {"relative_error": error, "change_from_base": change}


def _lay_over(model: nn.Module, layers: Mapping[str, Tensor]) -> None:
    """Load full layers of the model's own shape into it; a head for other labels has no place."""
    own = {name: value.shape for name, value in model.state_dict().items()}
    fitting = {name: x for name, x in layers.items() if own.get(name) == x.shape}
    model.load_state_dict(fitting, strict=False)


def _random_inputs(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{config.model_type}: takes {model.main_input_name} but input_ids or pixel_values "
            "are expected. Check this adapter without its base."
        )
    text_config = config.get_text_config()
    tokens = torch.randint(text_config.vocab_size, (2, 12), generator=generator)
    inputs = {"input_ids": tokens}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if "pixel_values" in inspect.signature(model.forward).parameters:
        inputs |= _with_images(model, tokens, generator)
    return inputs


def _with_images(
    model: Any, tokens: Int[Tensor, "examples tokens"], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return pixels, and token ids with a place for every image feature if the model mixes them.

    Nothing is added for models whose images come in another form than pixels of one size.
    """
    config = model.config
    vision: Any = getattr(config, "vision_config", None)
    strides = getattr(vision, "patch_stride", None)  # Florence-2 takes images of any size
    side = getattr(vision, "image_size", None) or (2 * math.prod(strides) if strides else None)
    if not isinstance(side, int):
        return {}
    channels = getattr(vision, "num_channels", None) or vision.in_channels
    pixels = torch.randn(len(tokens), channels, side, side, generator=generator)
    place = getattr(config, "image_token_id", None)
    if place is None:  # as in CLIP, each kind of input has its own tower
        return {"pixel_values": pixels}
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels).pooler_output
    tokens = tokens.masked_fill(tokens == place, 0)
    places = torch.full((len(tokens), len(features[0])), place)
    return {"pixel_values": pixels, "input_ids": torch.cat([places, tokens], 1)}


def _output(model: Any, inputs: dict[str, Tensor]) -> Float[Tensor, "..."]:
    with torch.no_grad():
        return model(**inputs)[0].float()


@contextlib.contextmanager
def _added(model: nn.Module, expected: Adapter) -> Iterator[set[str]]:
    """Within the context, every module's output has the expected change added to it.

    Yields the modules that inputs have reached so far.
    """
    handles = []
    reached: set[str] = set()
    whole = _add_to_experts(model, expected)
    for parameter in parameters_of(expected.layouts):
        owner = model.get_submodule(parameter.rpartition(".")[0])
        handles.append(owner.register_forward_hook(lambda *_, name=parameter: reached.add(name)))
    for name, factors in expected.modules.items():
        layout = expected.layouts.get(name)
        if is_expert(layout):
            continue

        def add(
            layer: Any,
            inputs: tuple[Any, ...],
            output: Tensor,
            factors: LoRAFactors = factors,
            layout: str | None = layout,
            name: str = name,
        ) -> Tensor:
            reached.add(name)
            return output + _change(layer, inputs[0], factors, layout)

        handles.append(model.get_submodule(name).register_forward_hook(add))
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()
        for parameter, values in whole:
            parameter.data.copy_(values)


def _add_to_experts(model: nn.Module, expected: Adapter) -> list[tuple[nn.Parameter, Tensor]]:
    """Add the changes of experts to their parameters; return these with their values before."""
    layers = dict(model.named_modules())
    before = []
    for experts in parameters_of(expected.layouts).values():
        place = find_parameter(layers, experts[0])
        if place is None:
            raise InputError(f"{experts[0]}: not in the base but expected. Check the base.")
        parameter, is_turned = place
        before.append((parameter, parameter.detach().clone()))
        for module in experts:
            delta = expected.modules[module].delta()
            expert_slice(parameter.data, expected.layouts[module]).add_(
                delta.T if is_turned else delta
            )
    return before


def _change(layer: Any, x: Tensor, factors: LoRAFactors, layout: str | None) -> Tensor:
    if layout is None:
        return x @ factors.a.T @ factors.b.T
    if layout == EMBEDDING:
        # Some models (Gemma) scale their embeddings; PEFT scales the change with them.
        change = functional.embedding(x, factors.a.T.contiguous()) @ factors.b.T
        return change * getattr(layer, "embed_scale", 1.0)
    kernel = layer.weight.shape[1:]
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 2]
    hidden = conv(x, factors.a.unflatten(1, kernel), stride=layer.stride, padding=layer.padding)
    return conv(hidden, factors.b.reshape(*factors.b.shape, *(1 for _ in kernel[1:])))
