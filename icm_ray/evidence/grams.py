"""Gram statistics of module inputs: what RegMean weighs every task's change with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icm_ray.base_model.loading import find_module
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import Batch, pooled
from icm_ray.evidence.gram_files import GramOrder
from icm_ray.evidence.tensors import DESCRIPTION, GRAM_FORMAT, GRAMS, write_evidence
from icm_ray.files import is_done, read_json
from icm_ray.linalg.gram import Gram
from icm_ray.linalg.gram_sums import DirectionSum, WholeSum, kept_entries, sum_for
from icm_ray.types import Adapter

SUM_ENTRIES = 500_000_000
"""Numbers that sums hold at a time, 4 GB; the modules beyond are left to another pass."""


@dataclass(frozen=True)
class Grams:
    """One task's Gram statistics, `X^T X / n` over its n input rows without padding.

    Attributes:
        task: The adapter's name.
        fingerprint: The adapter's fingerprint.
        grams: By the module whose input was seen first, float32.
        shared: By module: the module in `grams` that has the same input, itself included.
        rows: Number of input rows of each Gram.
        inputs: Number of examples seen.
        left: Modules whose sums found no room beside the others'.
    """

    task: str
    fingerprint: str
    grams: Mapping[str, Gram]
    shared: Mapping[str, str]
    rows: Mapping[str, int]
    inputs: int
    left: tuple[str, ...] = ()


@torch.no_grad()
def gather_grams(
    model: nn.Module,
    adapter: Adapter,
    modules: Sequence[str],
    batches: Sequence[Batch],
    directions: int | None = None,
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
        directions: Of each Gram beside its diagonal; None: wholes.
    """
    sums = _Sums(batches[0].mask, directions)
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
    rows = {path: total.count for path, total in sums.totals.items()}
    return Grams(
        adapter.name,
        adapter.fingerprint,
        {path: sums.totals.pop(path).mean() for path in rows},  # each sum ends with its mean
        sums.shared,
        rows,
        sum(len(batch.rows) for batch in batches),
        tuple(sorted(sums.left)),
    )


def gather_parts(
    model: nn.Module, adapter: Adapter, batches: Sequence[Batch], order: GramOrder
) -> None:
    """Gather one task's Gram statistics into its parts, those that are there already left out."""
    number, left = 0, order.modules
    while left:
        part = order.scratch / adapter.name / f"{number:04}"
        if not is_done(part, order.key):
            found = gather_grams(model, adapter, left, batches, order.directions)
            write_evidence(
                part,
                GRAMS,
                {
                    f"{module}.{kind}.{adapter.name}": tensor
                    for module, gram in found.grams.items()
                    for kind, tensor in gram.tensors().items()
                },
                adapters={adapter.name: found.fingerprint},
                shared={adapter.name: found.shared},
                described={
                    "format": GRAM_FORMAT,
                    "inputs": {adapter.name: found.inputs},
                    "rows": {adapter.name: found.rows},
                    "left": found.left,
                },
                origin={"key": order.key},
            )
        number, left = number + 1, read_json(part / DESCRIPTION)["left"]


class _Sums:
    """Running sums of `x x^T`, one for each distinct input tensor, on the device of the input."""

    def __init__(self, mask: Tensor, directions: int | None) -> None:
        self.directions = directions
        self.totals: dict[str, WholeSum | DirectionSum] = {}
        self.shared: dict[str, str] = {}
        self.left: set[str] = set()
        self.entries = 0
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
                self._note(path, self.last[1])
                return
            mask = self.mask.to(x.device)
            rows = (x[mask] if x.shape[:2] == mask.shape else x).reshape(-1, x.shape[-1])
            if not len(rows):  # an expert that the router sent no token
                return
            self.last = (x, path)
            if path not in self.totals and path not in self.left:
                self._open(path, rows)
            self._note(path, path)
            if path in self.totals:
                self.totals[path].add(rows.float())

        return add

    def _open(self, path: str, rows: Tensor) -> None:
        entries = kept_entries(rows.shape[1], self.directions)
        if self.totals and self.entries + entries > SUM_ENTRIES:
            self.left.add(path)  # for good: it would miss the batches until there is room
            return
        self.entries += entries
        self.totals[path] = sum_for(rows.shape[1], rows.device, self.directions)

    def _note(self, path: str, owner: str) -> None:
        """Note whose Gram a module has, or that both are left."""
        if owner in self.left:
            self.left.add(path)
        else:
            self.shared[path] = owner
