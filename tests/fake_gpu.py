"""A GPU made of processor memory: computes the CPU's numbers, and stops where devices are mixed.

torch's FakeTensorMode follows devices without values, so it cannot pass what looks at a value
(a norm, a rank, a number of entries). Tensors here hold their values in ordinary memory and say
that they are on cuda:0; an operation that takes some from there and some from the processor, and
numpy on one of them, fail as they would on a GPU.

    with fake_gpu():
        torch.ones(2).to("cuda:0") + torch.ones(2)   # RuntimeError
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
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
    on_gpu = any(isinstance(x, OnGpu) for x in tensors)
    name = func.name().split(".")[0]
    others = [x for x in tensors if x.dim() and not isinstance(x, OnGpu)]
    if on_gpu and others and name not in COPIES and not _index_only(name, args, others):
        raise RuntimeError(f"{name}: expected all tensors on one device, found fakegpu:0 and cpu")
    device = kwargs.get("device")
    plain_args, plain = tree_map(_inner, (args, kwargs))
    out = func(*plain_args, **plain)
    if func._schema.is_mutable:
        return kwargs["out"] if "out" in kwargs else args[0]
    goes = torch.device(device).type == DEVICE.type if device is not None else on_gpu
    return tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) and goes else x, out)


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

    def find(self, name: str) -> torch.device:
        """Return it for "cuda", in the place of `devices.find_device`."""
        return torch.device(self.name if name == "cuda" else name)


STAND_IN = Accelerator(str(DEVICE), fake_gpu)
REAL = Accelerator("cuda:0", contextlib.nullcontext)
