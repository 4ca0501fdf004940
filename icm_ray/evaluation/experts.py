"""Experts on disk: an adapter, its frozen head if it has one, and what they scored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.adapters import open_adapter
from icm_ray.errors import InputError
from icm_ray.evaluation.adapter_heads import head_in
from icm_ray.evaluation.heads import Head
from icm_ray.files import read_json
from icm_ray.suites import Suite, Task

ADAPTER, HEAD, METRICS = "adapter", "head.safetensors", "metrics.json"
TRAJECTORIES = "trajectories"


@dataclass(frozen=True)
class Expert:
    """One expert's folder.

    Attributes:
        task: The task's name.
        folder: Holds `adapter/`, `metrics.json` and, where the task has one, `head.safetensors`.
        path: The adapter of an expert that was trained elsewhere; None: `adapter/` of the folder.
    """

    task: str
    folder: Path
    path: Path | None = None

    @property
    def adapter(self) -> Path:
        """The PEFT folder."""
        return self.path or self.folder / ADAPTER

    def head(self, said: str | None = None, beside: Path | None = None) -> Head | None:
        """Read the frozen head; None if there is none, so that the base must answer by itself.

        Args:
            said: Where it is: "adapter", "names" (nowhere), or a file; None: in the adapter's
                `score` or `classifier`, else in the expert's folder.
            beside: Folder that a named file is relative to.
        """
        if said == "names":
            return None
        if said not in (None, "adapter"):
            return Head.load((beside or self.folder) / str(said))
        path = self.folder / HEAD
        found = head_in(self.adapter)
        if found is None and said is None and path.is_file():
            return Head.load(path)
        return found

    def metrics(self) -> dict[str, Any]:
        """Read what training recorded."""
        return read_json(self.folder / METRICS)

    @property
    def writes(self) -> bool:
        """Whether the adapter may be a language model's, which can say a class's name."""
        file = open_adapter(self.adapter, self.task, saved_modules="keep")
        return file.config.get("task_type") in ("CAUSAL_LM", None)


def heads_of(suite: Suite, experts: Mapping[str, Expert]) -> tuple[Suite, dict[str, Head | None]]:
    """Return a suite that knows which classes a language model names, and the experts' heads.

    Heads are those of tasks that are read through one; None where the base's own answers do.

    Raises:
        InputError: naming every head that says another number of things than its task has.
    """
    heads: dict[str, Head | None] = {}
    for task, expert in experts.items():
        asked = suite.task(task)
        if asked.headed or asked.head == "names":
            heads[task] = expert.head(asked.head, suite.folder)
    misfits = [_misfit(suite.task(task), head) for task, head in heads.items() if head]
    if any(misfits):
        raise InputError(filter(None, misfits))
    classes = [t for t in heads if suite.task(t).kind == "classification" and heads[t] is None]
    names = {task: "names" for task in classes if experts[task].writes}
    return suite.with_heads(names), heads


def _misfit(task: Task, head: Head) -> str:
    """Return what is wrong with a head's number of outputs; empty if nothing is.

    A classification whose rows alone say the classes may not show the last ones of its head.
    """
    width, wanted = len(head.weight), task.outputs
    more = task.kind == "classification" and all(name.isdigit() for name in task.classes)
    if width == wanted or (more and width > wanted):
        return ""
    classes = f", the {len(task.classes)} classes" if task.classes else ""
    return (
        f"{task.name}: a head of {width} outputs but {wanted} are expected{classes} of a "
        f"{task.kind}. Give the task's own head, or name what it says with classes:."
    )


def find_experts(folder: Path) -> Mapping[str, Expert]:
    """Return the experts of one set by task name, sorted.

    Raises:
        InputError: the folder holds none.
    """
    found = sorted(folder.glob(f"*/{METRICS}"))
    if not found:
        raise InputError(f"{folder}: no expert in it. Train some with jobs.finetune.")
    return {metrics.parent.name: Expert(metrics.parent.name, metrics.parent) for metrics in found}


def ready_experts(adapters: Iterable[tuple[str, Path]]) -> dict[str, Expert]:
    """Return adapters by name as the experts of the tasks they are called after, sorted.

    Their heads are looked for in the adapter's folder, and beside an `adapter/` as jobs.finetune
    writes it.
    """
    return {
        name: Expert(name, path.parent if path.name == ADAPTER else path, path)
        for name, path in sorted(adapters)
    }
