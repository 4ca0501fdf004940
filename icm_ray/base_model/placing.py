"""Which part of a base lies on which of a worker's GPUs, or in the node's memory."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from icm_ray.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a base goes.

    Attributes:
        device: Of all of it, or of the first of several.
        dtype: What its floats become; None: as they are stored. What is packed stays packed.
        gpus: Over how many such devices its blocks are spread.
        offload: Whether blocks stay in the node's memory and come to the device when they run.
    """

    device: str = "cpu"
    dtype: str | None = None
    gpus: int = 1
    offload: bool = False


HERE = Place()


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
    blocks = _blocks_of(
        model, f"gpus_per_worker: {gpus}", "where it may be cut. Give each worker one GPU."
    )
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


def offloaded(model: Any, device: str, dtype: torch.dtype | None) -> Any:
    """Leave a model's blocks in the node's memory and put all else on a device.

    A block's weights are on the device while it runs, forward or backward: a device holds one block
    and what passes through, whatever the number of blocks.

    Raises:
        InputError: the model's class does not say which blocks are whole.
    """
    blocks = _blocks_of(model, "offload: true", "what its blocks are. Leave it out.")
    model = model.to(dtype=dtype)
    for _, part in _parts(model, blocks):
        if type(part).__name__ in blocks:
            _bring(part, torch.device(device))
        else:
            part.to(device)
    return model


def _blocks_of(model: Any, asked: str, lacks: str) -> frozenset[str]:
    """Return the classes of a model's blocks; InputError, saying what lacks, if it names none."""
    if not model._no_split_modules:
        raise InputError(f"resources.{asked} but {type(model).__name__} does not say {lacks}")
    return frozenset(model._no_split_modules)


def _bring(block: Any, device: torch.device) -> None:
    """Have a block fetch its weights when it is called, and let go of them afterwards."""
    from accelerate.utils import send_to_device

    run, home = block.forward, []
    for part in block.modules():
        part.computes_on = device
        part._buffers.update({n: b.to(device) for n, b in part._buffers.items() if b is not None})
        home += [(part._parameters, n, w) for n, w in part._parameters.items() if w is not None]

    def forward(*given: Any, **named: Any) -> Any:
        for place, name, weight in home:
            place[name] = weight.to(device)
        try:
            # A first block is given what the processor made of the inputs.
            return run(*send_to_device(given, device), **send_to_device(named, device))
        finally:
            for place, name, weight in home:
                place[name] = weight

    block.forward = forward


def is_offloaded(model: nn.Module) -> bool:
    """Say whether some of a model's weights are on its device only while they are used."""
    return any(hasattr(part, "computes_on") for part in model.modules())


def device_of(module: Any) -> torch.device:
    """Return where a module computes; its own weights may be packed, as buffers, or elsewhere."""
    if is_offloaded(module):
        return module.computes_on
    return next(itertools.chain(module.parameters(), module.buffers())).device


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
