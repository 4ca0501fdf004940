"""Join or start a Ray cluster, say what is missing before any work, and wait with a limit."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from icm_ray.backend_lines import without_backend_lines
from icm_ray.config import Resources
from icm_ray.distributed.progress import bar, calm_progress
from icm_ray.errors import ClusterError, ICMRayError

Key = TypeVar("Key", bound=Hashable)
MAX_RETRIES = 3
JOIN_SECONDS = 15.0

log = logging.getLogger(__name__)

_session_ends_with_us = False


@contextlib.contextmanager
def connected(resources: Resources) -> Iterator[None]:
    """Run the body on a cluster: an open session, RAY_ADDRESS's, or a local one of our own.

    A cluster we start asks for a token, listens on the loopback interface, and ends with the body.

    Raises:
        ClusterError: the cluster cannot be joined, or one worker's request fits no node.
    """
    import ray

    joined = os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(without_backend_lines())
            # Ray's own handler of SIGTERM would end the process with code 1 and tell nobody.
            with _signals_kept():
                _join(joined) if joined else _start_local(resources)
            calm_progress()
            stack.enter_context(_ended_by_us())
        check_fits(resources)
        yield


@contextlib.contextmanager
def _ended_by_us() -> Iterator[None]:
    global _session_ends_with_us
    import ray

    _session_ends_with_us = True
    try:
        yield
    finally:
        _session_ends_with_us = False
        ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _join(address: str) -> None:
    import ray.exceptions

    _refuse_silence(address)
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).partition("\n")[0]
        raise ClusterError(
            f"RAY_ADDRESS: {address}: cannot be joined ({type(error).__name__}: {reason}). Check "
            "that the cluster runs and that RAY_AUTH_MODE and its token are the cluster's own."
        ) from None
    _warn_if_open()


def _refuse_silence(address: str) -> None:
    """Raise ClusterError if nobody listens there: Ray itself would go on asking for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():  # "auto" and "local" are Ray's to find
        return
    try:
        socket.create_connection((host, int(port)), timeout=JOIN_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS: {address}: nobody answers ({error.strerror or error}) but a running "
            "cluster is expected. Start it, or unset RAY_ADDRESS for a local one."
        ) from None


def _start_local(resources: Resources) -> None:
    import ray

    cpus = os.cpu_count() or 1
    wanted = (resources.workers or 1) * resources.cpus_per_worker
    ray.init(
        address="local",
        num_cpus=max(cpus, int(wanted)),
        include_dashboard=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )


def _warn_if_open() -> None:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        log.warning(
            "The cluster at RAY_ADDRESS is used without token authentication: anyone who reaches "
            "it can run code. Start it with RAY_AUTH_MODE=token."
        )


def check_fits(resources: Resources) -> None:
    """Raise ClusterError if no node can ever hold one worker."""
    import ray

    demand = _demand(resources)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(k, 0) >= v for k, v in demand.items()) for node in nodes):
        return
    best = {k: max((node.get(k, 0) for node in nodes), default=0) for k in demand}
    short = ", ".join(f"{k} {v:g} (largest node has {best[k]:g})" for k, v in demand.items() if v)
    raise ClusterError(
        f"resources: no node can hold one worker: wants {short}. Lower resources: in the recipe "
        "or add a larger node."
    )


def worker_options(resources: Resources) -> dict[str, Any]:
    """Return what one worker asks Ray for, as `.options(...)` takes it."""
    options: dict[str, Any] = {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker,
    }
    if resources.memory_per_worker:
        options["memory"] = resources.memory_per_worker
    if resources.custom:
        options["resources"] = dict(resources.custom)
    return options


def worker_count(resources: Resources, items: int) -> int:
    """Return how many workers to start for `items` pieces of work on this cluster."""
    import ray

    limits = [items, *([resources.workers] if resources.workers else [])]
    demand = {name: amount for name, amount in _demand(resources).items() if amount}
    if demand:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        limits.append(sum(_fitting(node, demand) for node in nodes))
    return max(min(limits), 1)


def _fitting(node: Mapping[str, float], demand: Mapping[str, float]) -> int:
    """Return how many workers fit on one node; one that never starts would be waited for."""
    counts = []
    for name, amount in demand.items():
        held = node.get(name, 0.0)
        if name == "GPU" and amount < 1:  # a part of a GPU comes from a single one
            counts.append(int(held) * int(1 / amount + 1e-9))
        else:
            counts.append(int(held / amount + 1e-9))
    return min(counts)


def _demand(resources: Resources) -> dict[str, float]:
    need = worker_options(resources)
    amounts = {"CPU": need["num_cpus"], "GPU": need["num_gpus"], "memory": need.get("memory", 0)}
    return {**amounts, **need.get("resources", {})}


def run_bounded(
    workers: Sequence[Any],
    calls: Mapping[Key, Callable[[Any], Any]],
    *,
    timeout: float,
    label: str = "",
    done: Callable[[Key, Any], None] | None = None,
) -> dict[Key, Any]:
    """Give each idle worker the next call until all are done; at most one call a worker in flight.

    Args:
        workers: Actor handles, or None for plain tasks (one slot each).
        calls: By key: takes a worker and returns an ObjectRef.
        timeout: Longest wait, in seconds, for any one call to finish.
        label: Of the progress bar; without one, or without calls, none is drawn.
        done: Given each key and its result at once, in order of completion.

    Returns:
        Results in the order of `calls`, whatever the order of completion.

    Raises:
        ICMRayError: as raised by a call.
        ClusterError: a worker died more often than Ray retries, or the time-out passed.
    """
    results: dict[Key, Any] = {}
    with bar(len(calls), label) if label and calls else contextlib.nullcontext() as drawn:
        for key, result in _completed(workers, calls, timeout):
            results[key] = result
            if done:
                done(key, result)
            if drawn:
                drawn.add()
    return {key: results[key] for key in calls}


def _completed(
    workers: Sequence[Any], calls: Mapping[Key, Callable[[Any], Any]], timeout: float
) -> Iterator[tuple[Key, Any]]:
    import ray

    waiting, idle = list(calls), list(workers)
    flying: dict[Any, tuple[Key, Any]] = {}
    try:
        while waiting or flying:
            while waiting and idle:
                key, worker = waiting.pop(0), idle.pop(0)
                flying[calls[key](worker)] = (key, worker)
            ready, _ = ray.wait(list(flying), num_returns=1, timeout=timeout)
            if not ready:
                names = ", ".join(str(key) for key, _ in flying.values())
                raise ClusterError(
                    f"workers: no answer within {timeout:g} s about {names}. Finished work is "
                    "kept; run the same command again, or raise resources.timeout_seconds."
                )
            key, worker = flying.pop(ready[0])
            idle.append(worker)
            yield key, fetch(ready[0], key)
    finally:
        # The end of a session ends its calls. Cancelling them before can end this very process:
        # in Ray a cancelled task races with its own reply, and the loser fails a check.
        for reference in () if _session_ends_with_us else flying:
            with contextlib.suppress(Exception):  # best effort: the worker may be gone already
                ray.cancel(reference)


def run_tasks(
    function: Any,
    arguments: Mapping[Key, tuple[Any, ...]],
    resources: Resources,
    *,
    label: str = "",
) -> dict[Key, Any]:
    """Run a remote function once for each key, as many at a time as fit; see `run_bounded`.

    Args:
        function: Made by `ray.remote`.
        arguments: What it is called with, by key.
        resources: What each call gets.
        label: Of the progress bar; without one none is drawn.
    """
    if not arguments:
        return {}
    remote = function.options(**worker_options(resources)).remote

    def call(own: tuple[Any, ...]) -> Callable[[Any], Any]:
        return lambda _slot: remote(*own)

    slots = [None] * worker_count(resources, len(arguments))
    calls = {key: call(own) for key, own in arguments.items()}
    return run_bounded(slots, calls, timeout=resources.timeout_seconds, label=label)


def fetch(reference: Any, what: object) -> Any:
    """Return a remote result; errors of ours come back as themselves, Ray's as ClusterError."""
    import ray.exceptions

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ICMRayError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).partition("\n")[0]
        raise ClusterError(
            f"{what}: lost after {MAX_RETRIES} retries ({type(error).__name__}: {reason}). "
            "Finished work is kept; run the same command again."
        ) from None
