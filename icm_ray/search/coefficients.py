"""Coefficients by layer group, laid out as the evidence that learned methods merge with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from icm_ray.adapters.blocks import block_index
from icm_ray.errors import RecipeError
from icm_ray.evidence.learned import LearnedMerge
from icm_ray.search.spaces import Setting


def groups_of(modules: Sequence[str], groups: int) -> dict[str, str]:
    """Return the group of each module: g0 holds the first run of blocks and what has no block.

    Raises:
        RecipeError: there are fewer blocks than groups.
    """
    blocks = sorted({b for m in modules if (b := block_index(m)) is not None})
    if len(blocks) < groups:
        raise RecipeError(
            f"layer_groups: {groups} but the adapters have {len(blocks)} blocks. Ask for fewer."
        )
    of_block = {block: f"g{i * groups // len(blocks)}" for i, block in enumerate(blocks)}
    return {m: of_block.get(block_index(m) or 0, "g0") for m in modules}


def coefficients_of(
    setting: Setting, modules: Sequence[str], adapters: Mapping[str, str], groups: int
) -> LearnedMerge:
    """Return `sum_k c_k(group) delta_k` as evidence.

    `layers.<group>.<task>` is c itself; `layers.<group>` multiplies the task's weight, which is
    1 / K unless `weights.<task>` says otherwise. Groups that are not named have 1.

    Args:
        setting: With coefficients by layer group.
        modules: Every module of any adapter.
        adapters: Fingerprint of each adapter by task.
        groups: Number of layer groups.
    """
    tasks, group = tuple(sorted(adapters)), groups_of(modules, groups)
    strange = {name.partition(".")[0] for name in setting.layers} - set(group.values())
    if strange:
        raise RecipeError(f"search: layers.{min(strange)}: no such group of {groups}, from g0 on.")

    def value(task: str, of: str) -> float:
        if f"{of}.{task}" in setting.layers:
            return setting.layers[f"{of}.{task}"]
        return setting.layers.get(of, 1.0) * setting.weights.get(task, 1 / len(tasks))

    rows = {g: torch.tensor([[value(t, g)] for t in tasks]) for g in set(group.values())}
    tensors = {f"{m}.coefficients": rows[group[m]].clone() for m in sorted(modules)}
    origin: dict[str, Any] = {"layers": dict(setting.layers), "weights": dict(setting.weights)}
    report: dict[str, Any] = {"losses": {}, "warnings": {}, "unmoved": [], "history": {}}
    return LearnedMerge(tensors, tasks, dict(adapters), origin, report)
