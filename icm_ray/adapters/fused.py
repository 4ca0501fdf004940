"""Experts that a model keeps in one 3-D parameter, and PEFT's one pair of factors for all of them.

PEFT's `target_parameters` wraps the module that owns the parameter. With E experts of rank r,

    lora_A   (E * r, d_in)     expert by expert
    lora_B   (d_out, r * E)    rank by rank, the experts side by side

and expert e changes by scaling * B_e A_e. Here each expert is a module of its own, called
`<owner>.<parameter>.<e>`. Several parameters of one owner are wrapped in the order in which the
owner has them, each around the one before: the last one's keys are plain, and every other one's
have one more `base_layer` in them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from icm_ray.errors import InputError

ORDER = (
    *("weight", "gate_proj", "gate_up_proj", "gate_up_proj_bias", "up_proj"),
    *("down_proj", "down_proj_bias"),
)
"""The order in which every mixture of experts of transformers has its parameters."""
INNER = ".base_layer"
_KIND = "expert:"


def expert_layout(expert: int, experts: int) -> str:
    """Return the layout of one expert of a parameter."""
    return f"{_KIND}{expert}/{experts}"


def is_expert(layout: str | None) -> bool:
    """Say whether a layout is that of an expert inside a parameter."""
    return (layout or "").startswith(_KIND)


def place_of(layout: str) -> tuple[int, int]:
    """Return which expert a layout means, and of how many."""
    expert, experts = layout.removeprefix(_KIND).split("/")
    return int(expert), int(experts)


def matched_path(module: str, layout: str | None) -> str:
    """Return the path that PEFT matches names and patterns with; an expert's is its parameter's."""
    return module.rpartition(".")[0] if is_expert(layout) else module


def parameters_of(layouts: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the experts of every parameter in their order, by the parameter's path."""
    experts: dict[str, list[str]] = {}
    for module, layout in layouts.items():
        if is_expert(layout):
            experts.setdefault(matched_path(module, layout), []).append(module)
    return {p: sorted(ms, key=lambda m: place_of(layouts[m])) for p, ms in experts.items()}


def wrapper_paths(parameters: Iterable[str]) -> dict[str, str]:
    """Return, for each parameter, the path of PEFT's wrapper around it, which its keys begin with.

    Raises:
        InputError: an owner has several parameters whose order is not known.
    """
    owners: dict[str, list[str]] = {}
    for path in parameters:
        owner, _, name = path.rpartition(".")
        owners.setdefault(owner, []).append(name)
    unknown = sorted(
        f"{owner}.{name}"
        for owner, names in owners.items()
        if len(names) > 1
        for name in names
        if name not in ORDER
    )
    if unknown:
        raise InputError(
            f"target_parameters: {unknown[0]}, beside another parameter of one module, but one of "
            f"{', '.join(ORDER)} is expected: PEFT's keys do not say which is which. Train each "
            "in an adapter of its own."
        )
    paths = {}
    for owner, names in owners.items():
        outermost_first = sorted(names, key=ORDER.index if len(names) > 1 else None, reverse=True)
        for depth, name in enumerate(outermost_first):
            paths[f"{owner}.{name}"] = owner + depth * INNER
    return paths


def stacked(factors: Mapping[int, tuple[Tensor, Tensor]], experts: int) -> tuple[Tensor, Tensor]:
    """Return PEFT's two tensors of a parameter; smaller ranks and absent experts are zeros.

    Args:
        factors: `(a, b)`, `(rank, d_in)` and `(d_out, rank)`, by expert; at least one.
        experts: How many the parameter holds.
    """
    a, b = next(iter(factors.values()))
    rank = max(len(one) for one, _ in factors.values())
    down, up = a.new_zeros(experts, rank, a.shape[1]), b.new_zeros(b.shape[0], rank, experts)
    for expert, (a, b) in factors.items():
        down[expert, : len(a)] = a
        up[:, : len(a), expert] = b
    return down.flatten(0, 1), up.flatten(1)


def find_parameter(layers: Mapping[str, nn.Module], module: str) -> tuple[Any, bool] | None:
    """Return the parameter that holds an expert, and whether PEFT turns B A for it; None if absent.

    Args:
        layers: The model's modules by path.
        module: Path of the expert.
    """
    owner, _, name = module.rpartition(".")[0].rpartition(".")
    parameter = getattr(layers.get(owner), name, None)
    if not isinstance(parameter, nn.Parameter):
        return None
    is_turned = parameter.ndim == 3 and bool(getattr(layers[owner], "is_transposed", False))
    return parameter, is_turned


def refuse_experts(adapters: Sequence[Any], work: str) -> None:
    """Refuse adapters of fused experts where each module must be run by itself.

    Args:
        adapters: Loaded adapters or open files.
        work: What cannot be done, as the subject of a sentence.

    Raises:
        InputError: naming every such adapter.
    """
    found = {
        adapter.name: next((m for m in adapter.modules if is_expert(adapter.layouts.get(m))), None)
        for adapter in adapters
    }
    problems = [
        f"{name}: {module}: an expert inside of one parameter, but {work} sees the inputs of "
        "modules only. Choose a method that needs no inputs, such as svd or ties."
        for name, module in found.items()
        if module
    ]
    if problems:
        raise InputError(problems)


def expert_slice(parameter: Tensor, layout: str) -> Tensor:
    """Return the view of a parameter that one expert is; a 2-D parameter is one expert."""
    expert, _ = place_of(layout)
    return parameter[expert] if parameter.ndim == 3 else parameter


def weightless(shape: tuple[int, int], experts: int) -> nn.Parameter:
    """Return a parameter of `experts` zero matrices that takes next to no memory."""
    return nn.Parameter(torch.zeros(()).expand(experts, *shape), requires_grad=False)
