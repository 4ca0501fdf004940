"""One adapter's evidence: its task vector and its null-space ratios, in two forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icm_ray.evidence.base import find_module
from icm_ray.evidence.batches import Batch, pooled
from icm_ray.evidence.low_rank import applied
from icm_ray.linalg.subspace import null_space_ratio, row_space
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


def gather(model: nn.Module, adapter: Adapter, batches: Sequence[Batch]) -> AdapterEvidence:
    """Run the same inputs through the base and through base plus adapter.

    Both models see exactly the same batches; padding counts neither in the pooled states nor in
    the ratios.
    """
    bases = {m: row_space(f.a) for m, f in adapter.modules.items() if f.rank}
    base_state, base_ratios = _pass(model, None, bases, batches)
    expert_state, expert_ratios = _pass(model, adapter, bases, batches)
    return AdapterEvidence(
        adapter.name,
        adapter.fingerprint,
        (expert_state - base_state).float(),
        expert_ratios,
        base_ratios,
        sum(len(batch.rows) for batch in batches),
    )


@torch.no_grad()
def _pass(
    model: nn.Module,
    adapter: Adapter | None,
    bases: dict[str, Float[Tensor, "d_in q"]],
    batches: Sequence[Batch],
) -> tuple[Float[Tensor, " d_model"], dict[str, float]]:
    """Return the mean pooled state and the mean ratio of every module, in one pass."""
    sums = dict.fromkeys(bases, 0.0)
    keep = [torch.ones(0, dtype=torch.bool)]  # the current batch's mask, read by the hooks
    handles = []
    for path, basis in bases.items():
        module = find_module(model, path)
        basis = basis.to(next(module.parameters()).device)

        def count(_m: nn.Module, inputs: tuple[Tensor, ...], path: str = path, q: Tensor = basis) -> None:
            tokens = inputs[0]
            if tokens.ndim == 3 and tokens.shape[:2] == keep[0].shape:
                tokens = tokens[keep[0].to(tokens.device)]
            ratio = null_space_ratio(tokens.reshape(-1, q.shape[0]), q)
            sums[path] += float(ratio.double().sum())

        handles.append(module.register_forward_pre_hook(count))
    try:
        with applied(model, adapter):
            total, examples, tokens = torch.zeros(1, dtype=torch.float64), 0, 0
            for batch in batches:
                keep[0] = batch.mask
                total = total + pooled(model, batch).double().sum(0).cpu()
                examples, tokens = examples + len(batch.rows), tokens + int(batch.mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    return total / examples, {path: value / tokens for path, value in sums.items()}
