"""A GPU made of processor memory: computes the CPU's numbers, and stops where devices are mixed.

torch's FakeTensorMode follows devices without values, so it cannot pass what looks at a value
(a norm, a rank, a number of entries). Tensors here hold their values in ordinary memory and say
that they are on a GPU; an operation that takes some from there and some from the processor or from
another such GPU, and numpy on one of them, fail as they would on a GPU.

    with fake_gpu():
        torch.ones(2).to("cuda:0") + torch.ones(2)   # RuntimeError
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("fakegpu", _Backend())
DEVICE = torch.device("fakegpu:0")
COPIES = ("aten::copy_", "aten::_to_copy")


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device = DEVICE) -> "OnGpu":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def item(self) -> Any:
        return self.detach().inner.item()

    def tolist(self) -> Any:
        return self.detach().inner.tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def numpy(self, *_args: Any, **_named: Any) -> Any:
        raise TypeError("can't convert fakegpu:0 device type tensor to numpy")

    def __repr__(self, **_named: Any) -> str:
        return f"OnGpu({self.inner!r})"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation on the values, after a look at where its tensors are."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    gpus = {x.device for x in tensors if isinstance(x, OnGpu)}
    name = func.name().split(".")[0]
    others = [x for x in tensors if x.dim() and not isinstance(x, OnGpu)]
    mixed = len(gpus) > 1 or (gpus and others and not _index_only(name, args, others))
    if mixed and name not in COPIES:
        found = sorted({str(x.device) for x in tensors})
        raise RuntimeError(f"{name}: expected all tensors on one device, found {found}")
    device = kwargs.get("device")
    plain_args, plain = tree_map(_inner, (args, kwargs))
    out = func(*plain_args, **plain)
    if func._schema.is_mutable:
        return kwargs["out"] if "out" in kwargs else args[0]
    goes = torch.device(device) if device is not None else next(iter(gpus), None)
    if goes is None or goes.type != DEVICE.type:
        return out
    return tree_map(lambda x: OnGpu(x, goes) if isinstance(x, torch.Tensor) else x, out)


def _inner(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _index_only(name: str, args: Any, others: list[torch.Tensor]) -> bool:
    """Say whether what lies on the processor are places alone, which torch takes from there."""
    return (
        name in ("aten::index", "aten::index_put_")
        and isinstance(args[0], OnGpu)
        and all(not x.is_floating_point() for x in others)
    )


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Run the body as if there were a GPU called cuda:0."""
    before = torch._C._only_lift_cpu_tensors()  # so that torch.tensor(..., device) passes by here
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


@dataclass(frozen=True)
class Accelerator:
    """A device that is not the processor, and what the code on it runs under.

    Attributes:
        name: As torch spells it.
        on: Gives the context of such code.
    """

    name: str
    on: Callable[[], contextlib.AbstractContextManager[None]]

    def several(self, count: int) -> str:
        """Return what several such are called without their numbers; real ones have to be there."""
        kind = self.name.partition(":")[0]
        if kind == "cuda" and torch.cuda.device_count() < count:
            pytest.skip(f"fewer than {count} CUDA devices here")
        return kind

    def find(self, name: str) -> torch.device:
        """Return it for "cuda", in the place of `devices.find_device`."""
        return torch.device(self.name if name == "cuda" else name)


STAND_IN = Accelerator(str(DEVICE), fake_gpu)
REAL = Accelerator("cuda:0", contextlib.nullcontext)
