"""Parts that element-wise methods share: row blocks of deltas, DARE on them, and their sum."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.linalg.blocks import row_blocks
from icm_ray.linalg.sparsify import drop, row_keys
from icm_ray.seeding import seed_for
from icm_ray.types import Delta, LoRAFactors, ModuleContext, ModuleEvidence

Density = Annotated[float, Field(ge=1e-6, le=1, description="Share of entries to keep.")]
Blocks = Callable[[], Iterator[Tensor]]
"""Starts a pass over a module's values, `(tasks, rows, cols)` each, the same bits every time."""


def deltas(
    factors: Sequence[LoRAFactors],
    context: ModuleContext | None = None,
    evidence: ModuleEvidence | None = None,
    **_params: Any,
) -> Iterator[Tensor]:
    """Yield row blocks of the deltas: the `Entries` of `trim_passes`."""
    return row_blocks([(f.b, f.a) for f in factors])


def added(blocks: Blocks, shape: tuple[int, int], weights: Sequence[float]) -> Delta:
    """Return `sum_k weights[k] * values_k`; the blocks are changed in place."""

    def rows() -> Iterator[Tensor]:
        for block in blocks():
            total = block[0].mul_(weights[0])
            for values, weight in zip(block[1:], weights[1:], strict=True):
                total.add_(values, alpha=weight)
            yield total

    return Delta(shape, rows)


def dropped(
    blocks: Iterator[Tensor],
    context: ModuleContext,
    shape: tuple[int, int],
    density: float,
    evidence: ModuleEvidence | None = None,
    kind: str = "mask",
) -> Iterator[Tensor]:
    """Yield blocks whose entries were kept with probability `density`, times 1 / density.

    Paper: arXiv 2311.03099, Eq. 2 with p = 1 - density. The blocks are changed in place.

    Args:
        blocks: Consecutive row blocks, `(tasks, rows of the block, cols)`, contiguous.
        context: Its seed, tasks and module key the draws, so blocks of any height draw alike.
        shape: `(rows, cols)` of all blocks together.
        density: In (0, 1].
        evidence: Recorded keep-masks `<kind>.<task>` in place of draws, nonzero keeps.
        kind: What the masks are called; keys the draws too.

    Raises:
        InputError: the evidence lacks a task's mask, or a mask has another shape.
    """
    masks = _masks(context, evidence, kind, shape)
    seeds = [seed_for(context.seed, task, context.module, kind) for task in context.tasks]
    keys = [row_keys(seed, shape[0]) for seed in seeds]
    start = 0
    for block in blocks:
        part = slice(start, start + block.shape[1])
        start = part.stop
        for task, values in enumerate(block):
            if masks is not None:
                values.mul_((masks[task][part] != 0).float()).div_(density)
            elif density < 1:
                drop(values, keys[task][part], density, 1 / density)
        yield block


def _masks(
    context: ModuleContext, evidence: ModuleEvidence | None, kind: str, shape: tuple[int, int]
) -> list[Tensor] | None:
    if not evidence:
        return None
    masks = []
    for name in (f"{kind}.{task}" for task in context.tasks):
        found = tuple(evidence[name].shape) if name in evidence else "missing"
        if found != shape:
            raise InputError(
                f"evidence: {context.module}.{name} is {found} but {shape} is expected."
            )
        masks.append(evidence[name])
    return masks
