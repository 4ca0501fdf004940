"""What all work of a job shares: a base on the cluster, what a worker gets of it, and the seed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray

from icm_ray.base_model.loading import Base
from icm_ray.base_model.pictures import preprocessing_key
from icm_ray.base_model.shared_base import Prepare, SharedBase, share_base
from icm_ray.config import Resources
from icm_ray.distributed.actors import AdapterActor
from icm_ray.distributed.cluster import (
    Key,
    connected,
    place_of,
    run_bounded,
    worker_count,
    worker_options,
)


@dataclass(frozen=True)
class Session:
    """A base on a cluster.

    Attributes:
        resources: What each actor or worker gets.
        shared: What its workers need to map it on their nodes.
        seed: Keys every draw.
    """

    resources: Resources
    shared: SharedBase
    seed: int = 0

    @property
    def base(self) -> Path:
        """The base's folder on the driver's node, for its tokenizer."""
        return self.shared.path

    @property
    def key(self) -> str:
        """What identifies the base as workers run it: its weights, dtype and preprocessing."""
        stored, fingerprint = self.shared.dtype, self.shared.fingerprint
        dtype = self.resources.dtype or stored
        own = [dtype] if dtype != stored else []
        return " ".join([fingerprint, *own, *filter(None, [preprocessing_key(self.base)])])

    def load_base(self) -> Base:
        """Return the base as workers run it."""
        return self.shared.load(place_of(self.resources))

    @contextlib.contextmanager
    def pool(self, items: int) -> Iterator["Pool"]:
        """Lend adapter actors to the body: one for each item while they fit, else what fits.

        They start when the first call needs them and end with the body, so that what comes next
        finds its CPUs free.
        """
        pool = Pool(self, items)
        try:
            yield pool
        finally:
            pool.close()


@contextlib.contextmanager
def opened(
    resources: Resources, base: Path, seed: int = 0, prepare: Prepare | None = None
) -> Iterator[Session]:
    """Join or start a cluster for work on a base; see `cluster.connected` and `SharedBase`."""
    shared = share_base(base, prepare)
    with connected(resources):
        yield Session(resources, shared, seed)


class Pool:
    """A bounded number of actors that hold the base; see `Session.pool`."""

    def __init__(self, session: Session, items: int) -> None:
        """Take what actors will be started with; none is yet."""
        self.session, self.items = session, items

    @property
    def size(self) -> int:
        """How many actors it lends."""
        return worker_count(self.session.resources, self.items)

    @cached_property
    def actors(self) -> list[Any]:
        """Their handles; asking for them starts them."""
        session = self.session
        kind: Any = AdapterActor  # what `ray.remote` returns is not what type checkers see
        start = kind.options(**worker_options(session.resources)).remote
        return [start(session.shared, session.resources) for _ in range(self.size)]

    def map(
        self,
        method: str,
        arguments: Mapping[Key, tuple[Any, ...]],
        *,
        label: str = "",
        done: Callable[[Key, Any], None] | None = None,
    ) -> dict[Key, Any]:
        """Call one method of an idle actor for each key; see `cluster.run_bounded`.

        Args:
            method: Name of a method of `AdapterActor`.
            arguments: What it is called with, by key.
            label: Of the progress bar; without one none is drawn.
            done: Given each key and its result at once, in order of completion.
        """
        if not arguments:  # nothing is started for it
            return {}

        def call(given: tuple[Any, ...]) -> Callable[[Any], Any]:
            return lambda actor: getattr(actor, method).remote(*given)

        calls = {key: call(given) for key, given in arguments.items()}
        timeout = self.session.resources.timeout_seconds
        return run_bounded(self.actors, calls, timeout=timeout, label=label, done=done)

    def close(self) -> None:
        """End the actors."""
        for actor in self.__dict__.pop("actors", ()):
            ray.kill(actor)
