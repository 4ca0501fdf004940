"""Actors that hold the shared base and, one at a time, a task's adapter."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from icm_ray.adapters import AdapterFile, open_adapter
from icm_ray.adapters.saving import as_stored
from icm_ray.base_model.loading import fingerprint_weights
from icm_ray.base_model.readers import Inputs
from icm_ray.base_model.states import batches_of
from icm_ray.config import Resources
from icm_ray.distributed.cluster import MAX_RETRIES, request, worker_count
from icm_ray.distributed.shared_base import SharedBase, rebuild
from icm_ray.distributed.trials import measure, measurer_of
from icm_ray.errors import InputError
from icm_ray.evaluation.scoring import TaskData, TaskScore, evaluate
from icm_ray.evidence.gather import AdapterEvidence, example_ratios, gather
from icm_ray.evidence.grams import Grams, gather_grams
from icm_ray.evidence.tensors import given
from icm_ray.files import sha256_of
from icm_ray.linalg.threads import kernel_threads
from icm_ray.merging.merge import merge
from icm_ray.search.measuring import Measurer
from icm_ray.types import Adapter, SavedModulesPolicy


@dataclass(frozen=True)
class AdapterSource:
    """Where an actor finds its adapter.

    Attributes:
        name: The adapter's name.
        path: PEFT folder, visible on the actor's node.
        fingerprint: What it must be; None skips the check.
        saved_modules: Policy for `modules_to_save`.
    """

    name: str
    path: str
    fingerprint: str | None = None
    saved_modules: SavedModulesPolicy = "refuse"

    @classmethod
    def of(cls, file: AdapterFile, saved_modules: SavedModulesPolicy = "refuse") -> "AdapterSource":
        """Return where to find an adapter that was opened and checked already."""
        return cls(file.name, str(file.path.absolute()), file.fingerprint(), saved_modules)

    def load(self) -> Adapter:
        """Read the adapter; an InputError if it is not the one that was meant."""
        # Opened, not `load_adapter`ed: its warnings were told once, before Ray started.
        policy = self.saved_modules
        adapter = open_adapter(Path(self.path), self.name, saved_modules=policy).load()
        if self.fingerprint and adapter.fingerprint != self.fingerprint:
            raise InputError(f"{self.path}: the adapter changed while the job ran. Run it again.")
        return adapter


@dataclass(frozen=True)
class MergeSource:
    """A merge that an actor makes for itself, so that a point of a grid needs no folder.

    Attributes:
        files: The adapters to merge.
        order: What `merge` is called with besides.
        fingerprint: sha256 of all that; the same merge always gives the same adapter.
    """

    files: tuple[AdapterFile, ...]
    order: Mapping[str, Any]
    fingerprint: str

    @classmethod
    def of(cls, files: Sequence[AdapterFile], order: Mapping[str, Any]) -> "MergeSource":
        """Return the source of `merge(files, **order)`."""
        told = given(order["evidence"])
        plain = {**order, "evidence": told.identity if told else None}
        prints = {file.name: file.fingerprint() for file in files}
        return cls(tuple(files), order, sha256_of(["merge", plain, prints]))

    def load(self) -> Adapter:
        """Merge, and round as a written adapter would."""
        return as_stored(merge(self.files, **self.order).adapter)


@ray.remote(max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES)
class AdapterActor:
    """Holds the base (shared, never written to) and one adapter, and runs them on inputs.

    Every call names the adapter it is about, so a restarted actor picks up where a dead one left.
    """

    def __init__(self, shared: SharedBase, resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        self.base = rebuild(shared, resources)
        self.threads = resources.threads
        self.held: tuple[AdapterSource | MergeSource, Adapter] | None = None
        self.measurer: tuple[Any, Measurer] | None = None

    def hold(self, source: AdapterSource | MergeSource) -> Adapter:
        """Load the adapter unless it is the one already held."""
        if self.held is None or self.held[0] != source:
            self.held = (source, source.load())
        return self.held[1]

    def evidence(
        self, source: AdapterSource, inputs: Inputs, max_tokens: int, batch: int
    ) -> AdapterEvidence:
        """Return task vector and null-space ratios of one adapter on its own inputs."""
        batches = batches_of(self.base.reader, inputs, max_tokens, batch)
        return gather(self.base.model, self.hold(source), batches)

    def ratios(
        self,
        features: AdapterSource | MergeSource | None,
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
        modules: Sequence[str],
        inputs: Inputs,
        max_tokens: int,
        batch: int,
    ) -> Grams:
        """Return the Gram statistics of one adapter's own inputs."""
        batches = batches_of(self.base.reader, inputs, max_tokens, batch)
        with kernel_threads(self.threads):
            return gather_grams(self.base.model, self.hold(source), modules, batches)

    def scores(
        self,
        source: AdapterSource | MergeSource | None,
        data: Mapping[str, TaskData],
        only: Sequence[str],
        batch: int,
    ) -> dict[str, TaskScore]:
        """Score base plus adapter (None: the base alone) on some of the tasks in `data`."""
        adapter = self.hold(source) if source else None
        wanted = {name: data[name] for name in only}
        return evaluate(self.base, adapter, wanted, batch=batch, threads=self.threads)

    def measure(self, material: Sequence[Any], order: Mapping[str, Any]) -> dict[str, Any]:
        """Measure a trial of a search; see `search_trials.measure`.

        Args:
            material: What `search_trials.share_material` returned.
            order: Arguments of `search_trials.measure` but for the measurer.
        """
        if self.measurer is None or self.measurer[0] != material[0]:
            self.measurer = (material[0], measurer_of(self.base, ray.get(material[0])))
        return measure(self.measurer[1], **order)

    def base_fingerprint(self) -> str:
        """Return the sha256 of the base as this actor sees it now."""
        return fingerprint_weights({n: t.numpy() for n, t in self.base.weights().items()})


def start_actors(shared: SharedBase, resources: Resources, items: int) -> list[Any]:
    """Start a bounded pool of actors: one for each adapter while they fit, else as many as fit."""
    options = request(resources)
    return [
        AdapterActor.options(**options).remote(shared, resources)
        for _ in range(worker_count(resources, items))
    ]


@contextlib.contextmanager
def adapter_actors(shared: SharedBase, resources: Resources, items: int) -> Iterator[list[Any]]:
    """Start a pool for the body; it ends with it, so that what comes next finds its CPUs free."""
    actors = start_actors(shared, resources, items)
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)
