"""What Ray's errors mean to a user: disk or memory that ran out (4), or work that was lost (5)."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
import ray.exceptions

from icm_ray.errors import ClusterError, ICMRayError, ResourceError, by_cause

MAX_RETRIES = 3
MAX_LOST = 3
"""After so many pieces of work whose workers died each time, nothing new is begun."""

_OUT_OF_MEMORY = re.compile(r"running low on memory|memory usage threshold")
_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)


class LostWork(ClusterError):
    """Work whose workers died each time; `lost` says why, by what it was."""

    lost: Mapping[Any, str] = MappingProxyType({})


@contextlib.contextmanager
def blaming(tasks_of: Callable[[Any], Iterable[str]]) -> Iterator[None]:
    """Let work that the body loses be known by the tasks, or adapters, that it was about."""
    try:
        yield
    except LostWork as error:
        error.lost = {task: why for key, why in error.lost.items() for task in tasks_of(key)}
        raise


def as_ours(error: BaseException, what: object) -> BaseException:
    """Return what to raise instead of an error of Ray's.

    An error of ours, or a failed call to the operating system, that was raised in a worker comes
    back as itself; a bug stays as it is.

    Args:
        error: What Ray raised.
        what: What was being done, as the message names it.
    """
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, ICMRayError | OSError):
            return cause
        return as_ours(cause, what) if isinstance(cause, ray.exceptions.RayError) else error
    if not isinstance(error, ray.exceptions.RayError):
        return error
    kind, text = told(error)
    return kind(f"{what}: {text}")


def told(error: BaseException) -> tuple[type[ICMRayError], str]:
    """Return the kind of error that one of Ray's own is, and what it says, without a place."""
    lines = _lines(error)
    if isinstance(error, _FULL):
        return ResourceError, f"the object store is full ({_first(lines, error)}).{_spilling()}"
    low = next((i for i, line in enumerate(lines) if _OUT_OF_MEMORY.search(line)), None)
    if low is not None or isinstance(error, ray.exceptions.OutOfMemoryError):
        reason = " ".join(lines[low or 0 : (low or 0) + 2])
        return ResourceError, (
            f"out of memory, its worker was ended {MAX_RETRIES + 1} times ({reason}) Use fewer "
            "workers, a smaller batch, or a larger node."
        )
    return ClusterError, (
        f"lost after {MAX_RETRIES} retries ({type(error).__name__}: {_first(lines, error)}). "
        "Finished work is kept; run the same command again."
    )


def lost_work(lost: Mapping[Any, BaseException], left: int, label: str = "") -> ICMRayError:
    """Return one error about all work whose workers died each time.

    Args:
        lost: Ray's error, by what it was.
        left: How much was not begun because of it.
        label: Of all of it, before each name.
    """
    known = {key: told(error) for key, error in lost.items()}
    before = f"{label}: " if label else ""
    problems = by_cause((f"{before}{key}", text) for key, (_, text) in known.items())
    if left:
        problems.append(f"workers: {left} more pieces of work were not begun.")
    if (kind := next(iter(known.values()))[0]) is not ClusterError:
        return kind(problems)
    error = LostWork(problems)
    error.lost = {
        key: f"its workers died {MAX_RETRIES + 1} times ({_first(_lines(one), one)})"
        for key, one in lost.items()
    }
    return error


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]


def _first(lines: Sequence[str], error: BaseException) -> str:
    return lines[0].rstrip(".") if lines else type(error).__name__


def _spilling() -> str:
    """Return where this node's store goes when memory is full, and what is free there."""
    from ray._private import worker

    node = worker._global_node
    if node is None:
        return " Use fewer adapters at once, or a larger object store."
    folder = Path(node.get_session_dir_path())
    free = shutil.disk_usage(folder if folder.is_dir() else folder.anchor).free
    return (
        f" {folder}, where it spills to, has {free} bytes free. Free some there, or use fewer "
        "adapters at once."
    )
