"""What Ray's errors mean to a user: disk or memory that ran out (4), or work that was lost (5)."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import ray
import ray.exceptions

from icm_ray.errors import ClusterError, ICMRayError, ResourceError, by_cause

MAX_RETRIES = 3
MAX_LOST = 3
"""After so many pieces of work whose workers died each time, nothing new is begun."""

_OUT_OF_MEMORY = re.compile(r"running low on memory|memory usage threshold")
_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)


class LostWork(ClusterError):
    """Work whose workers died each time; `lost` is what it was."""

    lost: tuple[object, ...] = ()


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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
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


def lost_work(lost: Sequence[tuple[object, BaseException]], left: int) -> ICMRayError:
    """Return one error about all work whose workers died each time.

    Args:
        lost: What it was, and Ray's error.
        left: How much was not begun because of it.
    """
    known = [(str(what), *told(error)) for what, error in lost]
    problems = by_cause((what, text) for what, _, text in known)
    if left:
        problems.append(f"workers: {left} more pieces of work were not begun.")
    if (kind := known[0][1]) is not ClusterError:
        return kind(problems)
    error = LostWork(problems)
    error.lost = tuple(what for what, _ in lost)
    return error


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
