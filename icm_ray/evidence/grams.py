"""Gram statistics of module inputs: what RegMean weighs every task's change with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icm_ray.base_model.loading import find_module
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import Batch, pooled
from icm_ray.types import Adapter


@dataclass(frozen=True)
class Grams:
    """One task's Gram statistics, `X^T X / n` over its n input rows without padding.

    Attributes:
        task: The adapter's name.
        fingerprint: The adapter's fingerprint.
        grams: `(d_in, d_in)` float32 by the module whose input was seen first.
        shared: By module: the module in `grams` that has the same input, itself included.
        rows: Number of input rows of each Gram.
        inputs: Number of examples seen.
    """

    task: str
    fingerprint: str
    grams: Mapping[str, Float[Tensor, "d_in d_in"]]
    shared: Mapping[str, str]
    rows: Mapping[str, int]
    inputs: int


@torch.no_grad()
def gather_grams(
    model: nn.Module, adapter: Adapter, modules: Sequence[str], batches: Sequence[Batch]
) -> Grams:
    """Run a task's unlabelled inputs once through its fine-tuned model.

    Paper: RegMean, arXiv 2212.09849, section 3.3. The inputs of every layer come from the task's
    own model. Modules that read one and the same tensor (query, key and value) share one Gram.

    Args:
        model: The frozen base.
        adapter: The task's adapter.
        modules: Modules to look at, those of other adapters of the merge included. Embeddings and
            convolutions have no Gram and are left out.
        batches: The inputs; padding is left out of the sums.
    """
    sums = _Sums(batches[0].mask)
    handles = []
    try:
        for path in modules:
            module = find_module(model, path)
            if hasattr(module, "in_features") or type(module).__name__ == "Conv1D":
                handles.append(module.register_forward_pre_hook(sums.hook(path)))
        with applied(model, adapter):
            for batch in batches:
                sums.start(batch.mask)
                pooled(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return Grams(
        adapter.name,
        adapter.fingerprint,
        {path: (total / sums.rows[path]).float() for path, total in sums.totals.items()},
        sums.shared,
        sums.rows,
        sum(len(batch.rows) for batch in batches),
    )


class _Sums:
    """Running sums of `x^T x`, one for each distinct input tensor."""

    def __init__(self, mask: Tensor) -> None:
        self.totals: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        self.start(mask)

    def start(self, mask: Tensor) -> None:
        """Forget the tensors of the batch before."""
        self.mask = mask
        # The tensor itself is kept, since another one could get the identity of a freed one. Only
        # the last: modules that share an input are called one after the other.
        self.last: tuple[Tensor, str] | None = None

    def hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a hook that adds a module's input, or notes whose Gram it shares."""

        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if self.last is not None and self.last[0] is x:
                self.shared[path] = self.last[1]
                return
            mask = self.mask.to(x.device)
            rows = (x[mask] if x.shape[:2] == mask.shape else x).reshape(-1, x.shape[-1]).float()
            if not len(rows):  # an expert that the router sent no token
                return
            self.last = (x, path)
            self.shared[path] = path
            gram = (rows.T @ rows).cpu().double()
            self.totals[path] = self.totals[path] + gram if path in self.totals else gram
            self.rows[path] = self.rows.get(path, 0) + rows.shape[0]

        return add
