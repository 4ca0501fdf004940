"""A suite: tasks on one base, with their data. A built-in one and a user's folder are the same."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from icm_ray.errors import InputError, did_you_mean
from icm_ray.suites.table import Table
from icm_ray.suites.tasks import SPLITS, Examples, Task


@dataclass(frozen=True)
class Suite:
    """Tasks on one base model, with their data; `opening.open_suite` reads one from a folder.

    Args:
        name: Name in `SUITES`, or the folder's.
        base: Base model, as `prepare_base` takes it; None: the adapters' own.
        tasks: The tasks by name.
        folder: Where `suite.yaml` is.
        revision: Of a base of the hub.
        tables: Where each task's examples come from.
        is_packaged: Whether it comes with the package.
    """

    name: str
    base: str | None
    tasks: Mapping[str, Task]
    folder: Path
    revision: str | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    is_packaged: bool = False

    def load(self, task: str, split: str, limit: int | None = None) -> Examples:
        """Return the first `limit` examples of a split, or all of them.

        Raises:
            InputError: There is no such task or split, fewer examples than `limit`, or something
                is wrong with the data.
        """
        table = self._table(task)
        if split not in SPLITS:
            raise InputError(
                f"suite {self.name!r}: split: {split!r} but expected one of "
                f"{', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
        records = table.records(split)
        if not 0 < (len(records) if limit is None else limit) <= len(records):
            asked = "some" if limit is None else str(limit)
            raise InputError(
                f"suite {self.name!r}: {task}/{split}: {asked} examples were asked for but it "
                f"holds {len(records)}. Ask for 1 to {len(records)}."
            )
        return table.examples(records[:limit], self.task(task).classes_to_choose)

    def count(self, task: str, split: str) -> int:
        """Return how many examples a split holds."""
        return len(self._table(task).records(split))

    def fingerprint(self, task: str) -> str:
        """Return what identifies a task's data and how they are read."""
        return self._table(task).fingerprint

    def split_hash(self, task: str, split: str, limit: int | None = None) -> str:
        """Return the hex sha256 of exactly the examples that `load` gives."""
        return self.load(task, split, limit).fingerprint

    def limit(self, asked: int | None, usual: int) -> int | None:
        """Return how many examples of a split are used: as asked for, else all of a user's."""
        return asked or (usual if self.is_packaged else None)

    def with_heads(self, heads: Mapping[str, str]) -> "Suite":
        """Return the suite with what was found of where heads are, by task or adapter."""
        said = {self._key(name): head for name, head in heads.items()}
        tasks = {n: replace(t, head=said.get(n, t.head)) for n, t in self.tasks.items()}
        return replace(self, tasks=tasks)

    def experts_of(self, names: Collection[str]) -> dict[str, str]:
        """Return the adapter of each task that has one of some names."""
        pairs = {name: task.expert or name for name, task in self.tasks.items()}
        return {task: adapter for task, adapter in pairs.items() if adapter in names}

    def __contains__(self, name: str) -> bool:
        """Say whether a task, or a task's adapter, has that name."""
        return self._key(name) in self.tasks

    def task(self, name: str) -> Task:
        """Return a task by its name or its adapter's.

        Raises:
            InputError: there is none.
        """
        if name not in self:
            known = dict.fromkeys(
                [*self.tasks, *(t.expert for t in self.tasks.values() if t.expert)]
            )
            raise InputError(
                f"suite {self.name!r}: task: {name!r} but expected one of "
                f"{', '.join(known)}.{did_you_mean(name, known)}"
            )
        return self.tasks[self._key(name)]

    def _key(self, name: str) -> str:
        if name in self.tasks:  # no adapter of another task is called so
            return name
        return next((task for task, one in self.tasks.items() if one.expert == name), name)

    def _table(self, name: str) -> Table:
        return self.tables[self.task(name).name]
