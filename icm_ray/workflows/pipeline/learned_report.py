"""What the report shows of learned rows: what they learned, and whether it paid."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from icm_ray.evaluation.metrics import Answers, mean_difference
from icm_ray.evaluation.scoring import standing
from icm_ray.kinds import RANDOM
from icm_ray.report import BASE, EXPERT, Gap
from icm_ray.report.data import OF_TASKS
from icm_ray.report.summary import init_of
from icm_ray.report.text import method_label
from icm_ray.suites.tasks import FIDELITY
from icm_ray.workflows.learn import learned_row
from icm_ray.workflows.pipeline.ratios import read_ratios
from icm_ray.workflows.pipeline.table import DEFAULT, SetResults, Table


def learned_report(table: Table) -> dict[str, Any]:
    """Return the fields of `ReportData` that learned rows fill; pictures show the first set."""
    first = table.sets[0]
    tasks_of = {row.name: row.tasks for row in table.rows}
    adapted = {r.name: first.fused[r.name] for r in table.rows if r.in_context}
    ratios = {row: read_ratios(folder) for row, folder in table.ratios.items()}
    return {
        "learned": [
            learned_row(row, folder, first.files(tasks_of[row]))
            for row, folder in {**first.learned, **adapted}.items()
        ],
        "state_ratios": {row: found.by_module() for row, found in ratios.items()},
        "quartiles": _quartiles(table, first),
        "curves": table.curves,
        "gaps": list(_gaps(table)),
    }


def _quartiles(table: Table, one: SetResults) -> dict[str, dict[str, list[float]]]:
    """Return accuracy by row and classification, from the lowest quarter of ratios up."""
    tasks = table.suite.tasks.items()
    kinds = {name: task.kind for name, task in tasks if task.metric != FIDELITY}
    quartiles: dict[str, dict[str, list[float]]] = {}
    for row, folder in table.ratios.items():
        ratios = read_ratios(folder)
        scores = one.scores[row, DEFAULT, "test"]
        quartiles[row] = {}
        for task in (task for task in ratios.values if kinds.get(task) == "classification"):
            right = scores[task].predictions == _targets(table, task)
            quartiles[row][task] = [float(right[part].mean()) for part in ratios.quarters(task)]
    return quartiles


def _targets(table: Table, task: str) -> np.ndarray:
    return table.suite.load(task, "test", table.recipe.sizes.test).targets


def _gaps(table: Table) -> Iterator[Gap]:
    """Yield each learned row beside the best that learns nothing from the same experts' merge."""
    tasks_of = {row.name: tuple(row.tasks or ()) for row in table.rows}
    inits: dict[str, list[SetResults]] = {}
    for one in table.sets:
        inits.setdefault(init_of(one.label), []).append(one)
    for init, sets in inits.items():
        means = _means(sets)
        learned = [*sets[0].learned, *sets[0].fused]
        for name in learned:
            others = {
                key: mean
                for key, mean in means.items()
                if key[0] not in learned and tasks_of[key[0]] == tasks_of[name]
            }
            if others:
                best = max(others, key=lambda key: others[key])
                yield _gap(table, sets, init, name, best)


def _means(sets: list[SetResults]) -> dict[tuple[str, bool], float]:
    """Return the mean normalised test score of every merge, by row and whether it was tuned.

    The chosen setting may differ from set to set.
    """
    means: dict[tuple[str, bool], list[float]] = {}
    for one in sets:
        expert, base = (one.scores[who, DEFAULT, "test"] for who in (EXPERT, BASE))
        for row, variant in one.merged:
            if not row.endswith((OF_TASKS, RANDOM)):
                mean = standing(one.scores[row, variant, "test"], expert, base).mean
                # The default can be the best setting, and then it is both.
                for tuned in {variant != DEFAULT, one.chosen.get(row) == variant}:
                    means.setdefault((row, tuned), []).append(mean)
    return {key: sum(m) / len(m) for key, m in means.items() if len(m) == len(sets)}


def _gap(
    table: Table,
    sets: list[SetResults],
    init: str,
    name: str,
    best: tuple[str, bool],
) -> Gap:
    other, tuned = best
    answers = []
    for one in sets:
        expert = one.scores[EXPERT, DEFAULT, "test"]
        ours = one.scores[name, DEFAULT, "test"]
        theirs = one.scores[other, one.chosen[other] if tuned else DEFAULT, "test"]
        answers += [
            Answers(
                table.suite.tasks[task],
                ours[task].predictions,
                theirs[task].predictions,
                _targets(table, task),
                expert[task].score.value,
            )
            for task in ours
            if expert[task].score.value > 0
        ]
    difference, low, high = mean_difference(answers)
    return Gap(
        init=init,
        method=name,
        baseline=method_label(other, tuned),
        difference=difference,
        low=low,
        high=high,
    )
