"""From single scores to the numbers one compares: mean and worst task, per expert set and init."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from icm_ray.errors import InputError
from icm_ray.report.data import REFERENCES, ScoreRow, Split, is_reference
from icm_ray.report.text import is_number, method_label, natural_key


@dataclass(frozen=True)
class Spread:
    """Mean and range of a number over expert sets."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class SetSummary:
    """One method on one set of experts.

    Attributes:
        rows: The scores behind the numbers, by task.
        mean: Mean over tasks of the normalised score.
        worst: Smallest normalised score.
        worst_task: The task it belongs to.
        mean_kept: Mean over tasks of the kept share of the experts' gain.
        worst_kept: Smallest such share.
        correlation: Mean over regressions of the rank correlation; None without any.
        mean_seen, mean_unseen: `mean` over the tasks whose experts were merged, and over others.
        missing: Tasks others were scored on but this method was not, or not with a number. A
            method with missing tasks never ranks above one without.
    """

    expert_set: str
    method: str
    tuned: bool
    rows: dict[str, ScoreRow]
    mean: float | None
    worst: float | None
    worst_task: str | None
    mean_kept: float | None
    worst_kept: float | None
    correlation: float | None
    mean_seen: float | None
    mean_unseen: float | None
    missing: tuple[str, ...]

    @property
    def label(self) -> str:
        """Method, and whether it was tuned."""
        return method_label(self.method, self.tuned)

    @property
    def is_reference(self) -> bool:
        """Whether this is an expert, probe, base or control row and not a merge."""
        return is_reference(self.method)

    @property
    def params(self) -> str:
        """The parameters, as short text."""
        return ", ".join(sorted({row.params for row in self.rows.values() if row.params}))

    @property
    def rank(self) -> int:
        """Largest rank of the scored adapters."""
        return max(row.rank for row in self.rows.values())


@dataclass(frozen=True)
class InitSummary:
    """One method over all sets of experts with the same kind of LoRA init.

    Attributes:
        sets: The summaries this one is made from, by expert set.
        mean, worst, mean_kept, worst_kept, correlation, mean_seen, mean_unseen: Mean and range,
            over sets, of those of `SetSummary`.
        worst_task: The task with the smallest normalised score of any set.
        scores: Mean and range, over sets, of each task's score.
        missing: Tasks missing in any set.
    """

    init: str
    method: str
    tuned: bool
    sets: tuple[SetSummary, ...]
    mean: Spread | None
    worst: Spread | None
    worst_task: str | None
    mean_kept: Spread | None
    worst_kept: Spread | None
    correlation: Spread | None
    mean_seen: Spread | None
    mean_unseen: Spread | None
    scores: dict[str, Spread | None]
    missing: tuple[str, ...]

    @property
    def label(self) -> str:
        """Method, and whether it was tuned."""
        return method_label(self.method, self.tuned)

    @property
    def is_reference(self) -> bool:
        """Whether this is an expert, probe, base or control row and not a merge."""
        return is_reference(self.method)

    @property
    def params(self) -> str:
        """The parameters, if they are the same for every set."""
        texts = {one.params for one in self.sets}
        return texts.pop() if len(texts) == 1 else "chosen for each expert set"

    @property
    def ranks(self) -> str:
        """Rank, or smallest to largest rank of the sets."""
        ranks = sorted({one.rank for one in self.sets})
        return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"

    @property
    def seconds(self) -> float:
        """Mean over sets of what the merge took, learning included."""
        return sum(next(iter(one.rows.values())).seconds for one in self.sets) / len(self.sets)


@dataclass(frozen=True)
class Summary:
    """All summaries of one split, best first within each expert set and init, references last."""

    sets: tuple[SetSummary, ...]
    across: tuple[InitSummary, ...]
    tasks: tuple[str, ...]

    @property
    def inits(self) -> tuple[str, ...]:
        """The kinds of LoRA init, sorted."""
        return tuple(sorted({row.init for row in self.across}))

    @property
    def expert_sets(self) -> tuple[str, ...]:
        """The expert sets, sorted."""
        return tuple(sorted({row.expert_set for row in self.sets}, key=natural_key))

    def of_init(self, init: str, *, references: bool = False) -> list[InitSummary]:
        """Return the merges (or the references) of one init, best first."""
        return [r for r in self.across if r.init == init and r.is_reference == references]


def init_of(expert_set: str) -> str:
    """Return "shared" for "shared-seed0"; a name of another form is its own init."""
    found = re.fullmatch(r"(.+)-seed\d+", expert_set)
    return found[1] if found else expert_set


def summarise(scores: Iterable[ScoreRow], split: Split) -> Summary:
    """Return the summaries of one split, per expert set and per init.

    Raises:
        InputError: one method has two scores for the same expert set, task and split.
    """
    groups: dict[tuple[str, str, bool], dict[str, ScoreRow]] = defaultdict(dict)
    expected: dict[str, set[str]] = defaultdict(set)
    for row in scores:
        if row.split != split:
            continue
        group = groups[row.expert_set, row.method, row.tuned]
        if row.task in group:
            raise InputError(
                f"scores: {row.expert_set}, {method_label(row.method, row.tuned)!r}, "
                f"{row.task!r}: two {split} scores but one expected. Label each setting apart."
            )
        group[row.task] = row
        if is_number(row.normalised):
            expected[row.expert_set].add(row.task)
    sets = [_summarise_set(list(rows.values()), expected[key[0]]) for key, rows in groups.items()]
    sets.sort(key=lambda one: (natural_key(one.expert_set), *_ranking(one, one.mean)))
    by_init: dict[tuple[str, str, bool], list[SetSummary]] = defaultdict(list)
    for one in sets:
        by_init[init_of(one.expert_set), one.method, one.tuned].append(one)
    across = [_summarise_init(init, group) for (init, _, _), group in by_init.items()]
    across.sort(key=lambda row: (row.init, *_ranking(row, row.mean and row.mean.mean)))
    tasks = sorted({row.task for one in sets for row in one.rows.values()})
    return Summary(tuple(sets), tuple(across), tuple(tasks))


def _ranking(row: SetSummary | InitSummary, mean: float | None) -> tuple[object, ...]:
    position = -2 if not row.is_reference else -1  # merges first, then controls
    if row.method in REFERENCES:
        position = REFERENCES.index(row.method)
    return position, bool(row.missing), mean is None, -(mean or 0.0), row.method, row.tuned


def _summarise_set(rows: list[ScoreRow], expected: set[str]) -> SetSummary:
    rows.sort(key=lambda row: row.task)
    ratios = {row.task: row.normalised for row in rows if is_number(row.normalised)}
    kept = _numbers(row.gain_kept for row in rows)
    worst_task = min(ratios, key=ratios.__getitem__, default=None)
    return SetSummary(
        expert_set=rows[0].expert_set,
        method=rows[0].method,
        tuned=rows[0].tuned,
        rows={row.task: row for row in rows},
        mean=_mean(_numbers(ratios.values())),
        worst=ratios[worst_task] if worst_task is not None else None,
        worst_task=worst_task,
        mean_kept=_mean(kept),
        worst_kept=min(kept, default=None),
        correlation=_mean(_numbers(row.spearman for row in rows)),
        mean_seen=_mean(_numbers(row.normalised for row in rows if row.seen)),
        mean_unseen=_mean(_numbers(row.normalised for row in rows if not row.seen)),
        missing=tuple(sorted(expected - set(ratios))),
    )


def _summarise_init(init: str, sets: Sequence[SetSummary]) -> InitSummary:
    tasks = sorted({task for one in sets for task in one.rows})
    with_worst = [one for one in sets if one.worst is not None]
    lowest = min(with_worst, key=lambda one: one.worst or 0.0, default=None)
    return InitSummary(
        init=init,
        method=sets[0].method,
        tuned=sets[0].tuned,
        sets=tuple(sets),
        mean=_spread(one.mean for one in sets),
        worst=_spread(one.worst for one in sets),
        worst_task=lowest.worst_task if lowest else None,
        mean_kept=_spread(one.mean_kept for one in sets),
        worst_kept=_spread(one.worst_kept for one in sets),
        correlation=_spread(one.correlation for one in sets),
        mean_seen=_spread(one.mean_seen for one in sets),
        mean_unseen=_spread(one.mean_unseen for one in sets),
        scores={t: _spread(one.rows[t].score for one in sets if t in one.rows) for t in tasks},
        missing=tuple(sorted({task for one in sets for task in one.missing})),
    )


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if is_number(value)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _spread(values: Iterable[float | None]) -> Spread | None:
    found = _numbers(values)
    return Spread(sum(found) / len(found), min(found), max(found)) if found else None
