"""One task as the learner sees it: its adapter, its inputs and, if it has one, its head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from icm_ray.base_model.readers import Batch, shares
from icm_ray.base_model.states import Pooling, pool
from icm_ray.evaluation.heads import Head
from icm_ray.seeding import generator
from icm_ray.suites.tasks import of_patches
from icm_ray.types import Adapter


@dataclass(frozen=True)
class TaskInputs:
    """One task's adapter and the inputs it is judged by.

    Attributes:
        adapter: The task's expert; its name is the task's.
        batches: Fixed batches, one of them a step; `make_batches` sorts by length.
        head: The frozen head, for objectives that read it.
        kind: What the task asks for, as its suite says; None if nobody said.
        targets: Labels by original row, `(examples,)` or one for each patch: class indices,
            numbers standardised by the head's mean and deviation, or what a patch says of boxes.
            Only `Supervised` may look at them.
        max_new_tokens: Longest answer to a prompt; 0 where inputs are no prompts.
        end: Token that ends an answer; None: the base's own.
    """

    adapter: Adapter
    batches: Sequence[Batch]
    head: Head | None = None
    kind: str | None = None
    targets: Float[Tensor, "examples *patches"] | None = None
    max_new_tokens: int = 0
    end: int | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.adapter.name

    @property
    def dense(self) -> bool:
        """Whether the head reads each patch of an image."""
        return of_patches(self.kind)

    def batch_number(self, seed: int, step: int) -> int:
        """Return which batch a step uses: a fresh shuffle each epoch, keyed by seed and task."""
        epoch, position = divmod(step, len(self.batches))
        key = generator("learning order", seed, self.name, epoch)
        return int(torch.randperm(len(self.batches), generator=key)[position])


@dataclass(frozen=True)
class Seen:
    """What one forward pass showed.

    Attributes:
        inputs: `(examples, tokens, d_in)` by target module.
        hidden: Last hidden state `(examples, tokens, d_model)`, None if the pass stopped before.
        summary: What a classifier of the model's own class reads.
    """

    inputs: Mapping[str, Tensor]
    hidden: Float[Tensor, "examples tokens d_model"] | None = None
    summary: Float[Tensor, "examples d_model"] | None = None

    def pooled(
        self, mask: Bool[Tensor, "examples tokens"], how: Pooling = "mean"
    ) -> Float[Tensor, "examples d_model"]:
        """Return the state of each example that a head reads; the mean unless it says otherwise."""
        assert self.hidden is not None, "the objective did not ask for the hidden state"
        return pool(self.hidden, self.summary, mask, how)

    def read(
        self, batch: Batch, dense: bool, how: Pooling = "mean"
    ) -> Float[Tensor, "rows d_model"]:
        """Return what a head reads: pooled states, or those of all patches, image by image."""
        if not dense:
            return self.pooled(batch.mask, how)
        assert self.hidden is not None, "the objective did not ask for the hidden state"
        return self.hidden[:, batch.prefix :].flatten(0, 1)

    def split(self, batches: Sequence[Batch]) -> list["Seen"]:
        """Return each batch's share of a pass over several batches that were joined."""
        if len(batches) == 1:
            return [self]
        inputs = {path: shares(x, batches) for path, x in self.inputs.items()}
        hidden = None if self.hidden is None else shares(self.hidden, batches)
        summary = None if self.summary is None else shares(self.summary, batches)
        return [
            Seen(
                {path: parts[i] for path, parts in inputs.items()},
                None if hidden is None else hidden[i],
                None if summary is None else summary[i],
            )
            for i in range(len(batches))
        ]
