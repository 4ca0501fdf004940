"""The one merge that a run recommends: chosen on validation data, judged on test data."""

import math
from collections.abc import Mapping, Sequence

from icm_ray.config import MethodRow
from icm_ray.evaluation.metrics import Answers, mean_difference
from icm_ray.evaluation.scoring import TaskScore
from icm_ray.report import BASE, EXPERT, Choice, Difference, ScoreRow, summarise
from icm_ray.report.summary import SetSummary
from icm_ray.workflows.pipeline.table import DEFAULT, SetResults, Table, Variant


def best_row(table: Table, scores: Sequence[ScoreRow]) -> tuple[SetResults, Variant, bool] | None:
    """Return set, setting and whether tuned of the best row by validation, else the first row."""
    rows = {row.name: row for row in table.rows if not row.random}
    if ranked := _ranked(table, scores):
        best = ranked[0]
        one = next(one for one in table.sets if one.label == best.expert_set)
        return one, _variant(one, rows[best.method], _setting(one, best)), best.tuned
    if rows:
        # Without a grid nothing is scored on validation data; the first method is published
        # rather than one picked by looking at test scores.
        first = next(iter(rows.values()))
        return table.sets[0], _variant(table.sets[0], first, DEFAULT), False
    return None


def choice_of(table: Table, scores: Sequence[ScoreRow]) -> Choice | None:
    """Return what the run recommends, beside the next best, the adapters apart and the base."""
    found = best_row(table, scores)
    if found is None:
        return None
    one, variant, tuned = found
    ranked = _ranked(table, scores)
    second = next((row for row in ranked if row.method != variant.row.name), None)
    ahead = None
    if second is not None:
        ours = one.scores[variant.row.name, variant.name, "validation"]
        ahead = _beside(table, one, ours, (second.method, _setting(one, second)), "validation")
    ours = one.scores[variant.row.name, variant.name, "test"]
    apart = {task: _beside(table, one, {task: ours[task]}, None, "test") for task in one.experts}
    return Choice(
        method=variant.row.name,
        tuned=tuned,
        params=variant.name,
        compared=len({row.method for row in ranked}),
        mean=ranked[0].mean if ranked else None,
        second=second.label if second else None,
        ahead=ahead,
        apart=_beside(table, one, ours, None, "test"),
        base=_beside(table, one, ours, (BASE, DEFAULT), "test"),
        losses={task: loss for task, loss in apart.items() if loss is not None},
        left_out=table.offer.left_out,
        unproven=sorted(one.unproven),
        unseen=tuple(one.unseen),
    )


def _ranked(table: Table, scores: Sequence[ScoreRow]) -> list[SetSummary]:
    """Return every row that was scored on validation data, the best first."""
    names = {row.name for row in table.rows if not row.random}
    merges = [row for row in summarise(scores, "validation").sets if row.method in names]
    return sorted(merges, key=lambda row: -math.inf if row.mean is None else row.mean, reverse=True)


def _setting(one: SetResults, row: SetSummary) -> str:
    return one.chosen[row.method] if row.tuned else DEFAULT


def _variant(one: SetResults, row: MethodRow, name: str) -> Variant:
    return next(variant for variant in one.variants(row) if variant.name == name)


def _beside(
    table: Table,
    one: SetResults,
    ours: Mapping[str, TaskScore],
    other: tuple[str, str] | None,
    split: str,
) -> Difference | None:
    """Return scores of a set beside those of another row, or of each task's own adapter."""
    expert = one.scores[EXPERT, DEFAULT, split]
    theirs = one.scores[(*other, split)] if other else expert
    size = table.recipe.sizes.scored(split)
    answers = [
        Answers(
            table.suite.tasks[task],
            ours[task].predictions,
            theirs[task].predictions,
            table.suite.load(task, split, size).targets,
            expert[task].score.value,
        )
        for task in ours
        if task in expert and expert[task].score.value > 0
    ]
    if not answers:
        return None
    mean, low, high = mean_difference(answers)
    return Difference(mean=mean, low=low, high=high)
