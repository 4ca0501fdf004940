"""One forward pass of base plus merge, as far as it is needed, watching what passes by."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from icm_ray.adapters.blocks import block_path
from icm_ray.base_model.loading import find_module
from icm_ray.base_model.low_rank import Seat, change_shape, seat_of
from icm_ray.base_model.placing import is_offloaded
from icm_ray.base_model.states import Batch, outputs
from icm_ray.errors import InputError
from icm_ray.learning.inputs import Seen
from icm_ray.learning.parameters import Frame


@contextlib.contextmanager
def merged(
    model: nn.Module, frames: Mapping[str, Frame], cores: Mapping[str, Tensor]
) -> Iterator[None]:
    """Run the body with `left @ core @ right + residual` added to the model's modules.

    Nothing dense is formed, and gradients flow to the cores alone.

    Raises:
        InputError: a module is missing in the base or has another shape.
    """
    handles = []
    try:
        for path, frame in frames.items():
            module = find_module(model, path)
            _check_shape(path, module, frame)
            hook = _update(frame, cores[path], seat_of(module, model))
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _update(
    frame: Frame, core: Tensor, seat: Seat
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    right, left = frame.right.to(*seat), frame.left.to(*seat)
    core = core.to(seat[0])
    learned = right.shape[0]
    if frame.residual is not None:  # one product for both on either side
        right = torch.cat([right, frame.residual.a.to(right)])
        left = torch.cat([left, frame.residual.b.to(left)], 1)

    def update(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(right.device)  # of a spread base it may come from the device before
        inside = F.embedding(x, right.T) if frame.layout == "embedding" else x @ right.T
        if frame.residual is None:  # a slice of everything would cost a pass in the backward
            return output + _times(inside, core) @ left.T
        first, rest = inside.split([learned, inside.shape[-1] - learned], -1)
        return output + torch.cat([_times(first, core), rest], -1) @ left.T

    return update


def _times(inside: Tensor, core: Tensor) -> Tensor:
    """Multiply in the core's precision: half a base's would swallow the steps it learns by."""
    precise = inside.to(core.dtype)
    product = precise * core if core.ndim == 1 else precise @ core.T
    return product.to(inside.dtype)


def _check_shape(path: str, module: nn.Module, frame: Frame) -> None:
    expected = change_shape(module)
    shape = (frame.left.shape[0], frame.right.shape[1])
    if expected != shape:
        raise InputError(
            f"module {path}: the base's change is {expected} but the adapters' delta is {shape}. "
            "The adapters belong to another base."
        )


def observe(
    model: nn.Module, batch: Batch, modules: Sequence[str], *, hidden: bool, save: bool = False
) -> Seen:
    """Run the model as it stands and return what the objective asked to see.

    The pass ends at the last target module unless the last hidden state is wanted, and no
    language-model head is run.

    Args:
        model: The bare base; hooks of `merged` or `applied` may be on it.
        batch: The inputs.
        modules: Paths whose inputs are kept; those these inputs never reach are left out.
        hidden: Whether the last hidden state is wanted.
        save: Recompute blocks in the backward pass instead of keeping their activations. Done in
            any case where blocks are offloaded: to keep activations is to keep weights.
    """
    save = save or is_offloaded(model)
    seen: dict[str, Tensor] = {}

    def keeper(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_module: nn.Module, given: tuple[Any, ...]) -> None:
            seen[path] = given[0]
            if not hidden and len(seen) == len(modules):
                raise _Seen

        return keep

    handles = []
    with _saving(model, modules, hidden) if save else contextlib.nullcontext():
        try:
            for path in modules:
                handles.append(find_module(model, path).register_forward_pre_hook(keeper(path)))
            state, summary = outputs(model, batch)
        except _Seen:
            state = summary = None
        finally:
            for handle in handles:
                handle.remove()
    return Seen(seen, state, summary) if hidden else Seen(seen)


class _Seen(Exception):
    """Everything that was asked for has passed by."""


@contextlib.contextmanager
def _saving(model: nn.Module, modules: Sequence[str], hidden: bool) -> Iterator[None]:
    """Checkpoint every block of the model, except the one the pass ends inside of."""
    blocks: dict[str, Any] = {p: m for p, m in model.named_modules() if block_path(p) == p}
    if not hidden:
        watched = {id(find_module(model, path)) for path in modules}
        holding = [p for p, m in blocks.items() if watched & {id(part) for part in m.modules()}]
        for path in holding[-1:]:  # blocks are named in the order they run
            del blocks[path]
    before = {path: vars(block).get("forward") for path, block in blocks.items()}
    try:
        for block in blocks.values():
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for path, block in blocks.items():
            del block.forward  # the class's own shows again
            if before[path] is not None:  # a spread base's blocks have one each
                block.forward = before[path]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: checkpoint(forward, *given, use_reentrant=False, **named)
