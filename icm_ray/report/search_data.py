"""The plain values of one search; its page and its table are computed from these."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from icm_ray.files import write_json


@dataclass(frozen=True)
class Objective:
    """One objective: its name, which way is better, and what it is in one line."""

    name: str
    better: Literal["higher is better", "lower is better"]
    meaning: str


@dataclass(frozen=True)
class TrialRow:
    """One trial; see `search.ledger.Trial`."""

    number: int
    state: str
    origin: str
    method: str
    point: Mapping[str, Any]
    metrics: Mapping[str, float]
    scores: Mapping[str, float]
    node: str
    seconds: float
    error: str


@dataclass(frozen=True, kw_only=True)
class SearchData:
    """Everything the page of a search shows.

    Attributes:
        title: Heading.
        command: How to run it again.
        objectives: In the order of the recipe.
        trials: By number.
        best: Number of the best trial by the first objective.
        recipe: Text of its runnable recipe.
        front: Numbers of the trials that none beats in every objective; empty with one objective.
        importance: Share of the variance by searched name.
        standing: By split: mean, worst and normalised scores of the merged adapter.
    """

    title: str
    command: str
    objectives: Sequence[Objective]
    trials: Sequence[TrialRow]
    best: int
    recipe: str
    front: Sequence[int] = ()
    importance: Mapping[str, float] = field(default_factory=dict)
    standing: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def trial(self, number: int) -> TrialRow:
        """Return one trial."""
        return next(trial for trial in self.trials if trial.number == number)


def write_trials(data: SearchData, folder: Path) -> None:
    """Write trials.parquet, a row a trial and a column a value, metric and score; and best.json."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = ("number", "state", "origin", "method", "node", "seconds", "error")
    columns: dict[str, Any] = {n: [getattr(t, n) for t in data.trials] for n in plain}
    for kind in ("point", "metrics", "scores"):
        for name in sorted({name for t in data.trials for name in getattr(t, kind)}):
            values = [getattr(t, kind).get(name) for t in data.trials]
            columns[f"{kind}.{name}"] = _column(values)
    pq.write_table(pa.table(columns), folder / "trials.parquet", compression="zstd")
    best = asdict(data.trial(data.best))
    del best["node"], best["seconds"]
    summary = {"importance": dict(data.importance), "front": list(data.front), "best": best}
    write_json(folder / "search.json", {**summary, "standing": dict(data.standing)})


def _column(values: list[Any]) -> list[Any]:
    """Return numbers as they are; a column of several kinds, such as a choice, as text."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float}:
        return [None if v is None else float(v) for v in values]
    return [None if v is None else str(v) for v in values]
