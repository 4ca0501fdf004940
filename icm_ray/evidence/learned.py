"""What was learned, as named tensors: in memory, on disk, and back to a merge's factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.evidence.rebuild import KINDS, rebuild
from icm_ray.evidence.tensors import DESCRIPTION, TENSORS, Given, given, read_given, write_given
from icm_ray.files import read_json
from icm_ray.types import Adapter, LoRAFactors

KIND = "learned_merge"


@dataclass(frozen=True)
class LearnedMerge:
    """A learned merge of K adapters.

    Attributes:
        tensors: `<module>.<kind>` or `<module>.<kind>.<task>`; see `rebuild`.
        tasks: All tasks, sorted: the rows of coefficients.
        adapters: Fingerprint of each task's adapter.
        origin: How it was learned, as plain data: parameters, objective, start, recipe.
        report: What happened: losses before and after, their history, warnings, modules that got
            no gradient.
    """

    tensors: Mapping[str, Tensor]
    tasks: tuple[str, ...]
    adapters: Mapping[str, str]
    origin: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def factors(self, adapters: Sequence[Adapter]) -> dict[str, LoRAFactors]:
        """Return the merge of the adapters it was learned from, exactly.

        Raises:
            InputError: these are other adapters.
        """
        by_name = {adapter.name: adapter for adapter in adapters}
        self.check({name: adapter.fingerprint for name, adapter in by_name.items()})
        found = given(dict(self.tensors))
        assert isinstance(found, Given)
        result = {}
        for path in sorted({path for adapter in adapters for path in adapter.modules}):
            present = {
                t: by_name[t].modules[path] for t in self.tasks if path in by_name[t].modules
            }
            result[path] = rebuild(present, self.tasks, found.of(path, KINDS, self.tasks))
        return result

    def check(self, adapters: Mapping[str, str]) -> None:
        """Raise InputError unless the fingerprints by task are those it was learned from."""
        wrong = {t for t in {*adapters, *self.adapters} if adapters.get(t) != self.adapters.get(t)}
        if wrong:
            raise InputError(
                f"evidence: learned from other adapters than given for {', '.join(sorted(wrong))}. "
                "Learn it again with jobs.learn."
            )


def save_learned(
    learned: LearnedMerge, folder: Path, origin: Mapping[str, Any] | None = None
) -> None:
    """Write a learned merge to a new folder, all or nothing, as evidence that methods read.

    Args:
        learned: What to write.
        folder: The output.
        origin: What it was made from, such as the run's key; stored in the manifest.
    """
    described = {
        "tasks": list(learned.tasks),
        "origin": dict(learned.origin),
        "report": dict(learned.report),
    }
    write_given(
        folder,
        KIND,
        learned.tensors,
        adapters=learned.adapters,
        described=described,
        origin=origin,
    )


def load_learned(folder: Path) -> LearnedMerge:
    """Read a learned merge back.

    Raises:
        InputError: the folder is not intact, or holds another kind of evidence.
    """
    told = read_given(folder)
    if told.kind != KIND:
        raise InputError(f"{folder}: {told.kind} but {KIND} is expected. Learn it with jobs.learn.")
    described = read_json(folder / DESCRIPTION)
    return LearnedMerge(
        load_file(folder / TENSORS),
        tuple(described["tasks"]),
        told.adapters,
        described["origin"],
        described["report"],
    )
