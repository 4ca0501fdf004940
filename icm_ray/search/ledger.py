"""The searcher's memory: one small JSON file a trial, each with a checksum of its own.

    search.json        whose memory this is: the key of the recipe
    trials/00007.json  one trial, from the moment its values are chosen

Nothing here is executed or unpickled: a file that is not exactly what was written is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from icm_ray.errors import InputError, RecipeError
from icm_ray.files import read_json, sha256_of, write_json
from icm_ray.search.distributions import Value

FORMAT = 1
HEADER, TRIALS = "search.json", "trials"
State = Literal["running", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: Counted from 0, in the order in which values were chosen.
        point: Values by searched name.
        origin: Who chose them: "sampler", "grid" or a start point's name.
        state: Running, complete, stopped early, or failed.
        rungs: Values of the first objective by what was looked at, for early stopping.
        metrics: All metrics last measured.
        scores: Validation score by task.
        node: Id of the Ray node that measured it.
        seconds: Time it took.
        error: Why it failed.
    """

    number: int
    point: Mapping[str, Value]
    origin: str = "sampler"
    state: State = "running"
    rungs: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    node: str = ""
    seconds: float = 0.0
    error: str = ""

    def values(self, objectives: tuple[str, ...]) -> list[float]:
        """Return the values of the objectives."""
        return [self.metrics[name] for name in objectives]


class Ledger:
    """All trials of one search; every change is on disk before the call returns."""

    def __init__(self, folder: Path, key: str) -> None:
        """Open a search's memory, or begin one.

        Raises:
            RecipeError: the folder holds another search.
            InputError: a file is damaged, or was not written here.
        """
        self.folder = folder
        self.trials: dict[int, Trial] = {}
        header = folder / HEADER
        if not header.exists():
            strangers = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
            if strangers:
                raise InputError(
                    f"{folder}: no {HEADER} but files ({', '.join(strangers[:3])}). Choose an "
                    "empty or new folder."
                )
            (folder / TRIALS).mkdir(parents=True, exist_ok=True)
            write_json(header, {"format": FORMAT, "key": key})
        stored = read_json(header)
        if not isinstance(stored, dict) or "format" not in stored:
            raise InputError(f"{header}: not a search's header. Choose a new folder.")
        if (found := stored["format"]) != FORMAT:
            raise InputError(
                f"{header}: search of format {found} but {FORMAT} is expected. Go on with the "
                "version of icm_ray that began it, or choose a new folder."
            )
        if stored.get("key") != key:
            raise RecipeError(
                f"output: {folder} holds another search, but its memory only serves the same "
                "adapters, data, space, objectives, sampler and seed. Choose another output."
            )
        self._read()

    def _read(self) -> None:
        problems = []
        for path in sorted((self.folder / TRIALS).glob("*")):
            if path.name.startswith(".") and ".tmp" in path.name:
                path.unlink()  # cut off in the middle of a write; the trial is as it was before
                continue
            try:
                trial = _trial(read_json(path))
                if path.name != f"{trial.number:05d}.json":
                    raise ValueError
                self.trials[trial.number] = trial
            except (InputError, ValueError, TypeError, KeyError, AttributeError):
                problems.append(
                    f"{path}: not a trial as it was written here. Remove this file to have the "
                    "trial made again, or choose another output."
                )
        if problems:
            raise InputError(problems)

    def put(self, trial: Trial) -> Trial:
        """Write a trial."""
        plain = asdict(trial)
        for kind in ("rungs", "metrics", "scores"):  # JSON knows no NaN
            plain[kind] = {k: v for k, v in plain[kind].items() if math.isfinite(v)}
        path = self.folder / TRIALS / f"{trial.number:05d}.json"
        write_json(path, {**plain, "sha256": sha256_of(plain)})
        self.trials[trial.number] = trial
        return trial

    def change(self, number: int, **fields: Any) -> Trial:
        """Write a trial with some fields changed."""
        return self.put(replace(self.trials[number], **fields))

    def in_order(self) -> list[Trial]:
        """Return all trials by number."""
        return [self.trials[number] for number in sorted(self.trials)]


def _trial(plain: Any) -> Trial:
    digest = plain.pop("sha256")
    if sha256_of(plain) != digest:
        raise ValueError
    return Trial(**plain)
