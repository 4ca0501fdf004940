"""What an actor that holds the base needs to measure trials, and how it measures one."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from icm_ray.base_model.loading import Base
from icm_ray.errors import ICMRayError
from icm_ray.search.measuring import Material, Measurer, Wanted
from icm_ray.search.spaces import Setting
from icm_ray.types import Adapter, LoRAFactors

Arrays = Mapping[str, tuple[np.ndarray, np.ndarray, float]]


@dataclass(frozen=True)
class SharedMaterial:
    """What trials share, in the object store once; tensors as numpy arrays, which are not copied.

    Attributes:
        factors: ObjectRef of `[{module: (a, b, scaling)}]`, in the order of the adapters.
        rest: ObjectRef of the material without tensors of adapters.
    """

    factors: Any
    rest: Any


def share_material(material: Material) -> list[Any]:
    """Put the material into the object store; returns the list of one reference to all of it."""
    factors: list[Arrays] = [
        {m: (f.a.numpy(), f.b.numpy(), f.scaling) for m, f in adapter.modules.items()}
        for adapter in material.adapters
    ]
    bare = [replace(adapter, modules={}) for adapter in material.adapters]
    rest = replace(material, adapters=bare)
    shared = SharedMaterial(ray.put(factors), ray.put(rest))
    return [ray.put(shared)]  # in a list Ray hands the reference on and not the value


def _rebuilt(shared: SharedMaterial) -> Material:
    factors, rest = ray.get([shared.factors, shared.rest])
    adapters = [_with_modules(bare, own) for bare, own in zip(rest.adapters, factors, strict=True)]
    return replace(rest, adapters=adapters)


def _with_modules(bare: Adapter, arrays: Arrays) -> Adapter:
    modules = {m: LoRAFactors(_tensor(a), _tensor(b), s) for m, (a, b, s) in arrays.items()}
    return replace(bare, modules=modules)


def _tensor(array: np.ndarray) -> torch.Tensor:
    # Copied: a method that wrote to a shared array would change it for every trial on the node.
    return torch.from_numpy(array.copy())


def measurer_of(base: Base, shared: SharedMaterial) -> Measurer:
    """Return what measures trials on a base that an actor holds already."""
    return Measurer(base, _rebuilt(shared))


def measure(
    measurer: Measurer,
    setting: Mapping[str, Any],
    objectives: Sequence[str],
    examples: int | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Return metrics, scores, node and seconds; what makes a trial fail comes back as text.

    Args:
        measurer: Holds base and material.
        setting: Fields of a `Setting`, plain, so that who passes them on need not know it.
        objectives: Names in AIMS.
        examples: See `Wanted`.
        steps: See `Wanted`.
    """
    started = time.monotonic()
    answer: dict[str, Any] = {"node": ray.get_runtime_context().get_node_id()}
    try:
        wanted = Wanted(Setting(**setting), tuple(objectives), examples, steps)
        found = measurer.measure(wanted)
        answer |= {"metrics": dict(found.metrics), "scores": dict(found.scores)}
    except (ICMRayError, ArithmeticError, ValueError, RuntimeError) as error:
        answer["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return {**answer, "seconds": time.monotonic() - started}
