"""Actors that hold the shared base and, one at a time, a task's adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ray
import torch

from icm_ray.adapters import AdapterFile
from icm_ray.adapters.saving import as_stored
from icm_ray.base_model.readers import Inputs
from icm_ray.base_model.shared_base import SharedBase
from icm_ray.base_model.states import Pooling, batches_of
from icm_ray.config import Resources
from icm_ray.distributed.cluster import place_of
from icm_ray.distributed.faults import MAX_RETRIES
from icm_ray.distributed.trials import measure, measurer_of
from icm_ray.errors import InputError
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.realigned import Answers, realigned
from icm_ray.evaluation.scoring import Memory, TaskData, TaskScore, evaluate, with_heads
from icm_ray.evidence.gather import AdapterEvidence, example_ratios, gather
from icm_ray.evidence.gram_files import GramOrder
from icm_ray.evidence.grams import gather_parts
from icm_ray.files import sha256_of
from icm_ray.finetuning.trajectory import checkpoints_of
from icm_ray.linalg.threads import kernel_threads
from icm_ray.merging.merge import merge_as_asked
from icm_ray.merging.order import MergeRequest
from icm_ray.search.measuring import Measurer
from icm_ray.types import Adapter


class Source(Protocol):
    """Where an actor gets an adapter from; equal sources give equal adapters."""

    @property
    def fingerprint(self) -> str:
        """What identifies the adapter."""
        ...

    def load(self) -> Adapter:
        """Read or make the adapter."""
        ...


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that was opened and checked already, in a folder that the actor's node sees."""

    file: AdapterFile

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.file.name

    @property
    def fingerprint(self) -> str:
        """What the adapter was when it was opened."""
        return self.file.fingerprint

    def load(self) -> Adapter:
        """Read the adapter; an InputError if it is not the one that was meant."""
        adapter = replace(self.file).load()  # without what was remembered of the file
        if adapter.fingerprint != self.fingerprint:
            path = self.file.path
            raise InputError(f"{path}: the adapter changed while the job ran. Run it again.")
        return adapter


@dataclass(frozen=True)
class MergeSource:
    """A merge that an actor makes for itself, so that a point of a grid needs no folder.

    Attributes:
        files: The adapters to merge.
        request: What is asked for.
        fingerprint: Identifies all that; the same merge always gives the same adapter.
    """

    files: tuple[AdapterFile, ...]
    request: MergeRequest
    fingerprint: str

    @classmethod
    def of(cls, files: Sequence[AdapterFile], request: MergeRequest) -> "MergeSource":
        """Return the source of a merge."""
        return cls(tuple(files), request, request.key(files))

    def load(self) -> Adapter:
        """Merge, and round as a written adapter would."""
        return as_stored(merge_as_asked(self.files, self.request).adapter)


@dataclass(frozen=True)
class CheckpointSource:
    """An expert as it was at one step of its training.

    Attributes:
        expert: The finished expert, which gives everything but the weights.
        trajectory: Folder of its checkpoints.
        step: Which one.
    """

    expert: AdapterSource
    trajectory: Path
    step: int

    @property
    def fingerprint(self) -> str:
        """Identifies the checkpoint."""
        return sha256_of([self.expert.fingerprint, self.step])

    def load(self) -> Adapter:
        """Read the checkpoint."""
        expert = self.expert.load()
        checkpoints = checkpoints_of(expert, self.trajectory)
        modules = next(modules for step, modules in checkpoints if step == self.step)
        return replace(expert, modules=modules, fingerprint=self.fingerprint)


@ray.remote(max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES)
class AdapterActor:
    """Holds the base (shared, never written to) and one adapter, and runs them on inputs.

    Every call names the adapter it is about, so a restarted actor picks up where a dead one left.
    """

    def __init__(self, shared: SharedBase, resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        self.base = shared.load(place_of(resources))
        self.threads = resources.threads
        self.held: tuple[Source, Adapter] | None = None
        self.measurer: tuple[Any, Measurer] | None = None
        self.said: Memory = {}
        self.answers: Answers = {}

    def hold(self, source: Source) -> Adapter:
        """Load the adapter unless it is the one already held."""
        if self.held is None or self.held[0] != source:
            self.held = (source, source.load())
        return self.held[1]

    def evidence(
        self,
        source: Source,
        inputs: Inputs,
        max_tokens: int,
        batch: int,
        position: Pooling = "mean",
    ) -> AdapterEvidence:
        """Return task vector and null-space ratios of one adapter on its own inputs."""
        batches = batches_of(self.base.reader, inputs, max_tokens, batch)
        return gather(self.base.model, self.hold(source), batches, position)

    def ratios(
        self,
        features: Source | None,
        judge: AdapterSource,
        inputs: Inputs,
        max_tokens: int,
        batch: int,
    ) -> tuple[tuple[str, ...], torch.Tensor]:
        """Return the modules of `judge` and each input's null-space ratio there."""
        batches = batches_of(self.base.reader, inputs, max_tokens, batch)
        adapter = self.hold(features) if features else None
        with kernel_threads(self.threads):
            return example_ratios(self.base.model, adapter, judge.load(), batches)

    def grams(
        self,
        source: AdapterSource,
        order: GramOrder,
        inputs: Inputs,
        max_tokens: int,
        batch: int,
        merge: Source | None = None,
    ) -> None:
        """Write the Gram statistics of one adapter's own inputs to their parts.

        With a merge they are read through it, under the adapter's name.
        """
        batches = batches_of(self.base.reader, inputs, max_tokens, batch)
        adapter = self.hold(merge or source)
        if merge:
            adapter = replace(adapter, name=source.name, fingerprint=source.fingerprint)
        with kernel_threads(self.threads):
            gather_parts(self.base.model, adapter, batches, order)

    def scores(
        self,
        source: Source | None,
        data: Mapping[str, TaskData],
        only: Sequence[str],
        batch: int,
        heads: Mapping[str, Head] | None = None,
    ) -> dict[str, TaskScore]:
        """Score base plus adapter (None: the base alone) on some of the tasks in `data`.

        `heads` read in place of the experts' own.
        """
        adapter = self.hold(source) if source else None
        wanted = with_heads({name: data[name] for name in only}, heads or {})
        return evaluate(
            self.base, adapter, wanted, batch=batch, threads=self.threads, memory=self.said
        )

    def heads(
        self, source: Source | None, data: Mapping[str, TaskData], batch: int
    ) -> dict[str, Head]:
        """Return the heads of the tasks in `data`, fitted to their experts' answers."""
        adapter = self.hold(source) if source else None
        return realigned(
            self.base, adapter, data, batch=batch, threads=self.threads, memory=self.answers
        )

    def measure(self, material: Sequence[Any], order: Mapping[str, Any]) -> dict[str, Any]:
        """Measure a trial of a search; see `trials.measure`.

        Args:
            material: What `trials.share_material` returned.
            order: Arguments of `trials.measure` but for the measurer.
        """
        if self.measurer is None or self.measurer[0] != material[0]:
            self.measurer = (material[0], measurer_of(self.base, ray.get(material[0])))
        return measure(self.measurer[1], **order)
