"""What happened, as facts the page puts into words: the winners, and whether experts are real."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from icm_ray.kinds import ERRORS, REALIGNED
from icm_ray.report.data import BASE, EXPERT, OF_TASKS, PROBE, REFERENCES, Gains, ScoreRow, Split
from icm_ray.report.summary import InitSummary, Spread, Summary
from icm_ray.report.text import natural_key

Verdict = Literal["beyond", "above", "not above", "no probe"]


@dataclass(frozen=True)
class Headline:
    """The winners among the merges of one init.

    Attributes:
        by_mean: Best mean normalised score; `by_mean_untuned` the best without tuning.
        by_worst: Best worst task.
        by_kept: Keeps most of what the experts gained over the base, so loses least.
        last: Smallest mean normalised score.
        below: Of `compared` scores of the best method by mean, how many are below the expert's
            by so much that the two 95 % intervals do not touch.
    """

    init: str
    num_sets: int
    num_tasks: int
    by_mean: InitSummary
    by_mean_untuned: InitSummary | None
    by_worst: InitSummary
    by_kept: InitSummary
    last: InitSummary
    below: int
    compared: int


@dataclass(frozen=True)
class ExpertCheck:
    """One expert beside a linear probe and the frozen base.

    Attributes:
        verdict: "beyond" if the expert is better than the probe beyond the 95 % interval, "above"
            if only its score is, else "not above".
    """

    expert_set: str
    task: str
    expert: ScoreRow
    probe: ScoreRow | None
    base: ScoreRow | None
    verdict: Verdict


def headline(summary: Summary, init: str) -> Headline | None:
    """Return the winners of one init, or None if nothing was merged or nothing is comparable."""
    # An adapter for each task, or a head, answers an easier question than one for all of them.
    merges = [
        row
        for row in summary.of_init(init)
        if row.mean and not row.method.endswith((OF_TASKS, REALIGNED))
    ]
    # A method that lacks a task is compared only if all of them do.
    complete = [row for row in merges if not row.missing] or merges
    if not complete:
        return None
    best = complete[0]
    below, compared = _below_expert(best, summary)
    return Headline(
        init=init,
        num_sets=len({one.expert_set for row in merges for one in row.sets}),
        num_tasks=len(summary.tasks),
        by_mean=best,
        by_mean_untuned=next((row for row in complete if not row.tuned), None),
        by_worst=_best(complete, lambda row: row.worst),
        by_kept=_best(complete, lambda row: row.mean_kept),
        last=complete[-1],
        below=below,
        compared=compared,
    )


def check_experts(
    scores: Iterable[ScoreRow], split: Split, gains: Gains | None = None
) -> list[ExpertCheck]:
    """Compare every expert of one split with its probe and base, by expert set and task.

    Args:
        scores: Scores of any methods; only the references count.
        split: Which examples.
        gains: Paired intervals of expert minus probe. Both answered the same examples, so these
            are sharper than two intervals side by side, which decide where none is given.
    """
    findings = {
        (row.expert_set, row.task, row.method): row
        for row in scores
        if row.split == split and row.method in REFERENCES
    }
    checks = []
    for (expert_set, task, method), row in findings.items():
        if method == EXPERT:
            probe = findings.get((expert_set, task, PROBE))
            base = findings.get((expert_set, task, BASE))
            gain = (gains or {}).get(expert_set, {}).get(task)
            verdict = _verdict(row, probe, gain)
            checks.append(ExpertCheck(expert_set, task, row, probe, base, verdict))
    return sorted(checks, key=lambda check: (natural_key(check.expert_set), check.task))


def _verdict(expert: ScoreRow, probe: ScoreRow | None, gain: tuple[float, float] | None) -> Verdict:
    if probe is None:
        return "no probe"
    if gain is None:
        is_beyond = expert.is_clear_of(probe)
    else:
        is_beyond = gain[1] < 0 if expert.metric in ERRORS else gain[0] > 0
    if is_beyond:
        return "beyond"
    return "above" if expert.beats(probe) else "not above"


def _best(rows: list[InitSummary], value: Callable[[InitSummary], Spread | None]) -> InitSummary:
    def key(row: InitSummary) -> float:
        spread = value(row)
        return spread.mean if spread else float("-inf")

    return max(rows, key=key)


def _below_expert(merge: InitSummary, summary: Summary) -> tuple[int, int]:
    experts = {one.expert_set: one.rows for one in summary.sets if one.method == EXPERT}
    pairs = [
        (row, experts[one.expert_set][task])
        for one in merge.sets
        for task, row in one.rows.items()
        if task in experts.get(one.expert_set, {})
    ]
    return sum(expert.is_clear_of(row) for row, expert in pairs), len(pairs)
