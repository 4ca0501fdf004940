"""Which part of a base lies on which of a worker's GPUs."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from icm_ray.errors import InputError


def device_plan(model: Any, device: str, gpus: int) -> dict[str, str]:
    """Return the device of each part of a model, by module path.

    Cuts are in front of blocks alone, so that each device gets about as many bytes. How much memory
    is free is not looked at: the plan is the same everywhere. Tied weights lie together.

    Args:
        model: The model, or one without weights.
        device: Their kind, as "cuda".
        gpus: How many there are, numbered from 0.

    Raises:
        InputError: the model's class does not say which blocks are whole.
    """
    if not model._no_split_modules:
        raise InputError(
            f"resources.gpus_per_worker: {gpus} but {type(model).__name__} does not say where it "
            "may be cut. Give each worker one GPU."
        )
    blocks = frozenset(model._no_split_modules)
    places: dict[nn.Parameter, int] = {}
    plan, number, before, total = {}, 0, 0, sum(weight.nbytes for weight in model.parameters())
    for path, part in _parts(model, blocks):
        weights = list(part.parameters())
        size = sum(weight.nbytes for weight in weights if weight not in places)
        if type(part).__name__ in blocks:
            number = before * gpus // total
        own = next((places[weight] for weight in weights if weight in places), number)
        places |= dict.fromkeys(weights, own)
        plan[path] = f"{device}:{own}"
        before += size
    return plan | {name: f"{device}:0" for name, _ in model.named_parameters(recurse=False)}


def _parts(model: nn.Module, blocks: frozenset[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what lies on one device: blocks, and modules with tensors of their own."""
    for name, part in model.named_children():
        here = f"{path}.{name}" if path else name
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if own or type(part).__name__ in blocks:
            yield here, part
        else:
            yield from _parts(part, blocks, here)


def placed(model: Any, plan: Mapping[str, str], dtype: torch.dtype | None) -> Any:
    """Move a model to where a plan says; what passes between devices is moved on its way.

    Args:
        model: The model.
        plan: As `device_plan` returns it, or one device for the path "".
        dtype: What its floats become; None: what they are.
    """
    from accelerate import dispatch_model

    if set(plan) == {""}:
        return model.to(device=plan[""], dtype=dtype)
    first = torch.device(next(iter(plan.values())))
    skipped = model._skip_keys_device_placement
    return dispatch_model(model.to(dtype=dtype), dict(plan), first, skip_keys=skipped)
