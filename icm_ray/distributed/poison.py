"""Which module of which adapter kills every worker that merges it: one look, once all retries died.

A worker that dies says nothing, so one more is sent over the same modules, and leaves a note with
an actor before each thing it does. The last note is where it died.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.exceptions

from icm_ray.adapters import AdapterFile
from icm_ray.config import Resources
from icm_ray.distributed.cluster import worker_options
from icm_ray.errors import ClusterError
from icm_ray.types import LoRAFactors

Read = Callable[[str, str], LoRAFactors]
"""Gets a task and a module."""
Work = Callable[[Sequence[str], Read], Any]
"""What is done with some modules, given how their factors are read."""


@ray.remote(num_cpus=0)
class _Notes:
    """Keeps the last thing that was begun."""

    last: tuple[str, str | None] | None = None

    def begin(self, module: str, task: str | None) -> None:
        """Note what is begun."""
        self.last = module, task

    def read(self) -> tuple[str, str | None] | None:
        """Return what was begun last."""
        return self.last


@ray.remote(max_retries=0)
def _look(work: Work, modules: Sequence[str], files: Mapping[str, AdapterFile], notes: Any) -> None:
    for module in modules:

        def read(task: str, module: str) -> LoRAFactors:
            ray.get(notes.begin.remote(module, task))
            factors = files[task].factors(module)
            ray.get(notes.begin.remote(module, None))
            return factors

        work([module], read)


def poisoned(
    work: Work, lost: Sequence[Sequence[str]], files: Any, resources: Resources
) -> ClusterError | None:
    """Return an error that names what kills the workers; None if none dies this time.

    Args:
        work: What was done with the modules.
        lost: Modules of each task whose workers died each time.
        files: Reference to the adapters by name.
        resources: What a worker gets.
    """
    places = [_place(work, modules, files, resources) for modules in lost]
    adapters: Any = ray.get(files)
    problems = [_told(*place, adapters) for place in dict.fromkeys(places) if place]
    return ClusterError(problems) if problems else None


def _place(
    work: Work, modules: Sequence[str], files: Any, resources: Resources
) -> tuple[str, str | None] | None:
    """Return the module at which a worker dies, and the adapter if it was being read."""
    timeout, kind = resources.timeout_seconds, _Notes
    notes: Any = kind.remote()  # type: ignore[attr-defined]
    look = _look.options(**worker_options(resources)).remote(work, modules, files, notes)
    try:
        ray.get(look, timeout=timeout)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
        return ray.get(notes.read.remote(), timeout=timeout)
    except ray.exceptions.RayError:  # it had no time, or an error of its own: it did not die
        return None
    finally:
        ray.kill(notes)
    return None


def _told(module: str, task: str | None, files: Mapping[str, AdapterFile]) -> str:
    if task is None:
        return (
            f"module {module!r}: every worker that merges it dies. Give workers more memory "
            "(resources.memory_per_worker), or take adapters out; run the same command again."
        )
    return (
        f"adapter {task!r} ({files[task].path}): module {module!r}: every worker that reads it "
        "dies. Copy the adapter anew, or leave it out, and run the same command again."
    )
