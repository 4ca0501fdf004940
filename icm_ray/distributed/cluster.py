"""Join or start a Ray cluster, say what is missing before any work, and wait with a limit."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from icm_ray.backend_lines import without_backend_lines
from icm_ray.base_model.placing import Place
from icm_ray.config import Resources
from icm_ray.distributed import is_joining
from icm_ray.distributed.faults import MAX_LOST, as_ours, lost_work
from icm_ray.distributed.joining import join, start_local
from icm_ray.distributed.progress import bar, calm_progress
from icm_ray.errors import ClusterError

Key = TypeVar("Key", bound=Hashable)

ASK_AGAIN_SECONDS = 0.5
"""Before a worker that could not be reached is asked once more."""

_session_ends_with_us = False


@contextlib.contextmanager
def connected(resources: Resources) -> Iterator[None]:
    """Run the body on a cluster: an open session, RAY_ADDRESS's, or a local one of our own.

    A cluster we start asks for a token, listens on the loopback interface, and ends with the body.

    Raises:
        RecipeError: RAY_ADDRESS is a cluster that anybody may use, and nobody said that it may be.
        ClusterError: the cluster cannot be joined, or one worker's request fits no node.
    """
    import ray.exceptions

    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(without_backend_lines())
            # Ray's own handler of SIGTERM would end the process with code 1 and tell nobody.
            with _signals_kept():
                join(os.environ["RAY_ADDRESS"]) if is_joining() else start_local(resources)
            calm_progress()
            stack.enter_context(_ended_by_us())
        check_fits(resources)
        try:
            yield
        except ray.exceptions.RayError as error:  # of ray.put, Train, Tune, Data
            if (ours := as_ours(error, "cluster")) is error:
                raise
            raise ours from error


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


def place_of(resources: Resources) -> Place:
    """Return where a worker's base goes."""
    how = resources
    return Place(how.device, how.dtype, how.whole_gpus, how.offload)


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
        label: Of the progress bar, and of what is lost; without one no bar is drawn.
        done: Given each key and its result at once, in order of completion.

    Returns:
        Results in the order of `calls`, whatever the order of completion.

    Raises:
        ICMRayError: as raised by a call.
        ClusterError: a call's workers died more often than Ray retries, or could not be reached
            for as long as the time-out, which is said when the others are done; or the time-out
            passed without an answer.
        ResourceError: the same, where memory or disk is what ran out.
    """
    results: dict[Key, Any] = {}
    with bar(len(calls), label) if label and calls else contextlib.nullcontext() as drawn:
        for key, result in _completed(workers, calls, timeout, label):
            results[key] = result
            if done:
                done(key, result)
            if drawn:
                drawn.add()
    return {key: results[key] for key in calls}


def _completed(
    workers: Sequence[Any], calls: Mapping[Key, Callable[[Any], Any]], timeout: float, label: str
) -> Iterator[tuple[Key, Any]]:
    import ray.exceptions

    waiting, idle = list(calls), list(workers)
    flying: dict[Any, tuple[Key, Any]] = {}
    lost: dict[Key, BaseException] = {}
    silent: dict[Key, float] = {}  # since when a call's worker cannot be reached
    try:
        while waiting or flying:
            while waiting and idle and len(lost) < MAX_LOST:
                key, worker = waiting.pop(0), idle.pop(0)
                flying[calls[key](worker)] = (key, worker)
            if not flying:
                break  # no worker is left, or too much was lost
            ready, _ = ray.wait(list(flying), num_returns=1, timeout=timeout)
            if not ready:
                names = ", ".join(str(key) for key, _ in flying.values())
                raise ClusterError(
                    f"workers: no answer within {timeout:g} s about {names}. Finished work is "
                    "kept; run the same command again, or raise resources.timeout_seconds."
                )
            key, worker = flying.pop(ready[0])
            what = f"{label}: {key}" if label else key
            try:
                result = ray.get(ready[0])
            except ray.exceptions.RayTaskError:  # of ours, or a bug: its worker lives
                result = fetch(ready[0], what)
            except ray.exceptions.RayError as error:
                if isinstance(error, ray.exceptions.ActorUnavailableError) and (
                    time.monotonic() - silent.setdefault(key, time.monotonic()) < timeout
                ):
                    # Ray's retries may all be spent before the cluster has decided whether a
                    # silent node is lost. Until then its worker is asked again.
                    time.sleep(ASK_AGAIN_SECONDS)
                    flying[calls[key](worker)] = (key, worker)
                    continue
                # What kills its workers is named in the end; the others' work goes on. A slot for
                # tasks is as good as before, an actor that was lost is not.
                lost[key] = error
                idle += [None] if worker is None else []
                continue
            idle.append(worker)
            yield key, result
        if lost:
            raise lost_work(lost, len(waiting), label)
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
    """Return a remote result; errors of ours come back as themselves, Ray's as `faults` says."""
    import ray.exceptions

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        if (ours := as_ours(error, what)) is error:
            raise
        raise ours from None
