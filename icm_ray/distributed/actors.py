"""Actors that hold the shared base and, one at a time, a task's adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from icm_ray.adapters import open_adapter
from icm_ray.config import Resources
from icm_ray.distributed.cluster import MAX_RETRIES, request, worker_count
from icm_ray.distributed.shared_base import SharedBase, rebuild
from icm_ray.errors import InputError
from icm_ray.evaluation.scoring import TaskData, TaskScore, evaluate
from icm_ray.evidence.base import fingerprint_weights
from icm_ray.evidence.batches import make_batches, tokenize
from icm_ray.evidence.gather import AdapterEvidence, gather
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


@ray.remote(max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES)
class AdapterActor:
    """Holds the base (shared, never written to) and one adapter, and runs them on inputs.

    Every call names the adapter it is about, so a restarted actor picks up where a dead one left.
    """

    def __init__(self, shared: SharedBase, resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        self.base = rebuild(shared, resources)
        self.threads = resources.threads
        self.held: tuple[AdapterSource, Adapter] | None = None

    def hold(self, source: AdapterSource) -> Adapter:
        """Load the adapter unless it is the one already held."""
        if self.held is None or self.held[0] != source:
            # Opened, not `load_adapter`ed: its warnings were told once, before Ray started.
            adapter = open_adapter(
                Path(source.path), source.name, saved_modules=source.saved_modules
            ).load()
            if source.fingerprint and adapter.fingerprint != source.fingerprint:
                raise InputError(
                    f"{source.path}: the adapter changed while the job ran. Run it again."
                )
            self.held = (source, adapter)
        return self.held[1]

    def evidence(
        self, source: AdapterSource, texts: Sequence[str], max_tokens: int, batch: int
    ) -> AdapterEvidence:
        """Return task vector and null-space ratios of one adapter on its own inputs."""
        ids = tokenize(self.base.tokenizer, texts, max_tokens)
        batches = make_batches(ids, batch, self.base.tokenizer.pad_token_id)
        return gather(self.base.model, self.hold(source), batches)

    def scores(
        self,
        source: AdapterSource | None,
        data: Mapping[str, TaskData],
        only: Sequence[str],
        batch: int,
    ) -> dict[str, TaskScore]:
        """Score base plus adapter (None: the base alone) on some of the tasks in `data`."""
        adapter = self.hold(source) if source else None
        wanted = {name: data[name] for name in only}
        return evaluate(self.base, adapter, wanted, batch=batch, threads=self.threads)

    def base_fingerprint(self) -> str:
        """Return the sha256 of the base as this actor sees it now."""
        return fingerprint_weights({n: t.numpy() for n, t in self.base.model.state_dict().items()})


def start_actors(shared: SharedBase, resources: Resources, items: int) -> list[Any]:
    """Start a bounded pool of actors: one for each adapter while they fit, else as many as fit."""
    options = request(resources)
    return [
        AdapterActor.options(**options).remote(shared, resources)
        for _ in range(worker_count(resources, items))
    ]
