"""One adapter's evidence: its task vector and its null-space ratios, in two forward passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icm_ray.base_model.loading import find_module
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import Batch, Pooling, pooled
from icm_ray.linalg.subspace import axis_ratios, null_space_ratio, row_space
from icm_ray.types import Adapter


@dataclass(frozen=True)
class AdapterEvidence:
    """What one adapter says about its own unlabelled inputs.

    Attributes:
        task: The adapter's name.
        fingerprint: The adapter's fingerprint.
        task_vector: `(d_model,)` float32, fine-tuned minus base (ICM-Fusion Eq. 1).
        expert_ratios: Null-space ratio by module, inputs from the fine-tuned model.
        base_ratios: Null-space ratio by module, inputs from the base.
        inputs: Number of examples seen.
    """

    task: str
    fingerprint: str
    task_vector: Float[Tensor, " d_model"]
    expert_ratios: dict[str, float]
    base_ratios: dict[str, float]
    inputs: int


def gather(
    model: nn.Module, adapter: Adapter, batches: Sequence[Batch], position: Pooling = "mean"
) -> AdapterEvidence:
    """Run the same inputs through the base and through base plus adapter.

    The task vector is of the states' mean over an input's tokens, as ICM-Fusion has it, or of the
    last token alone, as its predecessors' are.

    Both models see exactly the same batches; padding counts neither in the pooled states nor in
    the ratios. Ratios leave out modules of rank 0, convolutions, and modules that these inputs
    never reach.
    """
    bases = _bases(adapter)
    base_state, base_ratios = _pass(model, None, bases, batches, position)
    expert_state, expert_ratios = _pass(model, adapter, bases, batches, position)
    return AdapterEvidence(
        adapter.name,
        adapter.fingerprint,
        (expert_state - base_state).float(),
        expert_ratios,
        base_ratios,
        sum(len(batch.rows) for batch in batches),
    )


@torch.no_grad()
def example_ratios(
    model: nn.Module, features: Adapter | None, judge: Adapter, batches: Sequence[Batch]
) -> tuple[tuple[str, ...], Float[Tensor, "examples modules"]]:
    """Return the modules an adapter reads, and every example's mean null-space ratio there.

    Args:
        model: The base.
        features: What makes the modules' inputs besides the base: the expert, a merge, or nothing.
        judge: The adapter whose A the inputs are measured against.
        batches: The examples; rows of the result are in their original order.
    """
    bases = _bases(judge)
    ratios: list[dict[str, Tensor]] = []
    mask = [torch.ones(0, dtype=torch.bool)]  # the current batch's, read by the hooks

    def keeper(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            ratios[-1][path] = bases[path].by_example(inputs[0], mask[0]).cpu()

        return keep

    handles = [find_module(model, path).register_forward_pre_hook(keeper(path)) for path in bases]
    try:
        with applied(model, features):
            for batch in batches:
                mask[0] = batch.mask
                ratios.append({})
                pooled(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    reached = tuple(path for path in bases if all(path in one for one in ratios))
    values = torch.cat([torch.stack([one[path] for path in reached], 1) for one in ratios])
    order = torch.cat([batch.rows for batch in batches]).argsort()
    return reached, values[order]


def _bases(adapter: Adapter) -> dict[str, "_Basis"]:
    return {
        module: _Basis(adapter.layouts.get(module, "linear"), row_space(factors.a))
        for module, factors in adapter.modules.items()
        if factors.rank and not adapter.layouts.get(module, "").startswith("conv")
    }


@dataclass(frozen=True)
class _Basis:
    """The row space of one module's A, and how to measure the module's inputs against it."""

    layout: str
    q: Float[Tensor, "d_in q"]

    def ratios(self, inputs: Tensor, mask: Tensor) -> Float[Tensor, " rows"]:
        """Return the ratio of each input row; padding is left out where rows are tokens."""
        q, mask = self.q.to(inputs.device), mask.to(inputs.device)
        kept = inputs[mask] if inputs.shape[:2] == mask.shape else inputs
        if self.layout == "embedding":
            return axis_ratios(q)[kept.flatten()]
        return null_space_ratio(kept.reshape(-1, q.shape[0]), q)

    def by_example(self, inputs: Tensor, mask: Tensor) -> Float[Tensor, " examples"]:
        """Return each example's mean ratio over its real tokens."""
        q, mask = self.q.to(inputs.device), mask.to(inputs.device)
        if self.layout == "embedding":
            rows = axis_ratios(q)[inputs]
        else:
            rows = null_space_ratio(inputs.reshape(-1, q.shape[0]), q).reshape(inputs.shape[:-1])
        if rows.shape == mask.shape:
            return (rows * mask).sum(1) / mask.sum(1)
        return rows.reshape(len(mask), -1).mean(1)


@torch.no_grad()
def _pass(
    model: nn.Module,
    adapter: Adapter | None,
    bases: dict[str, _Basis],
    batches: Sequence[Batch],
    position: Pooling,
) -> tuple[Float[Tensor, " d_model"], dict[str, float]]:
    """Return the mean pooled state and the mean ratio of every module, in one pass."""
    sums: dict[str, tuple[float, int]] = dict.fromkeys(bases, (0.0, 0))
    mask = [torch.ones(0, dtype=torch.bool)]  # the current batch's, read by the hooks
    handles = []

    def counter(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            ratios = bases[path].ratios(inputs[0], mask[0])
            total, rows = sums[path]
            sums[path] = total + float(ratios.double().sum()), rows + ratios.numel()

        return count

    try:
        for path in bases:
            handles.append(find_module(model, path).register_forward_pre_hook(counter(path)))
        with applied(model, adapter):
            total, examples = torch.zeros(1, dtype=torch.float64), 0
            for batch in batches:
                mask[0] = batch.mask
                total = total + pooled(model, batch, position).double().sum(0).cpu()
                examples += len(batch.rows)
    finally:
        for handle in handles:
            handle.remove()
    return total / examples, {path: total / rows for path, (total, rows) in sums.items() if rows}
