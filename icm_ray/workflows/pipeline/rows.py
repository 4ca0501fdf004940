"""The rows of a results table: merged in parallel, tuned on validation data, then scored once.

A point of a grid is merged inside the actor that scores it; only default settings and what was
chosen become folders.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from icm_ray.adapters import open_adapter
from icm_ray.config import MethodRow
from icm_ray.distributed.actors import AdapterSource, MergeSource
from icm_ray.distributed.cluster import run_tasks
from icm_ray.distributed.heads import heads_on_ray
from icm_ray.distributed.merge import merge_to_folder
from icm_ray.distributed.scores import ScoreItem, Standings, references, score_on_ray
from icm_ray.distributed.session import Pool
from icm_ray.evaluation.realigned import realign_data
from icm_ray.evaluation.scoring import TaskScore, standing, task_data
from icm_ray.files import is_done, sha256_of
from icm_ray.kinds import REALIGNED
from icm_ray.merging.folder import PER_TASK, read_merged
from icm_ray.report.data import BASE, EXPERT, OF_TASKS
from icm_ray.workflows.pipeline.table import DEFAULT, SetResults, Table

HEADS = "heads"


def merge_rows(table: Table, which: Literal["default", "chosen"]) -> None:
    """Merge every row of every set into a folder, each in one task; what is there is kept.

    Written, reloaded with PEFT and compared before it counts.
    """
    folders: dict[tuple[int, str, str], Path] = {}
    missing: dict[tuple[int, str, str], tuple[Any, ...]] = {}
    for index, one in enumerate(table.sets):
        for row in table.rows:
            files = one.files_of(row)
            wanted = DEFAULT if which == "default" else one.chosen.get(row.name)
            for variant in (v for v in one.variants(row) if v.name == wanted):
                place = (index, row.name, variant.name)
                folder = table.root / "merged" / one.label / row.name / variant.name
                request, evicted = table.request(one, variant), table.gone.from_row(row.name)
                key = request.key(files)
                key = sha256_of([key, evicted]) if evicted else key
                folders[place] = folder
                if not is_done(folder, key):
                    missing[place] = (files, request, folder, key, evicted)
    run_tasks(merge_to_folder, missing, table.session.resources, label="merge")
    for (index, row_name, variant_name), folder in folders.items():
        table.sets[index].merged[row_name, variant_name] = read_merged(folder)


def choose(table: Table, one: SetResults, pool: Pool) -> None:
    """Score settings on validation data and note the best one of each row that has several."""
    tuned = [row for row in table.rows if row.grid or row.search]
    items, labels = [], {}
    for row in table.rows if table.validates_all else tuned:
        files = one.files_of(row)
        for variant in one.variants(row):
            source = MergeSource.of(files, table.request(one, variant))
            labels[row.name, variant.name] = f"{row.name}/{variant.name}"
            items.append(ScoreItem(labels[row.name, variant.name], source, one.scored))
    scores = _scored(table, one, pool, "validation", items)
    for (row_name, variant_name), label in labels.items():
        one.scores[row_name, variant_name, "validation"] = scores[label]
    for row in tuned:
        one.chosen[row.name] = _best(one, row)


def score_test(table: Table, one: SetResults, pool: Pool) -> None:
    """Score defaults and what was chosen on test data, per-task adapters under their own name."""
    wholes, parts = {}, []
    for (row, variant), merged in one.merged.items():
        source = AdapterSource(open_adapter(merged.folder))
        wholes[row, variant] = ScoreItem(f"{row}/{variant}", source, one.scored)
        for task in merged.report.get("per_task", {}):
            own = AdapterSource(open_adapter(merged.folder / PER_TASK / task))
            parts.append(ScoreItem(f"{row}/{variant}/{task}", own, (task,)))
    # Scored first: what kills a worker is told apart there, by task.
    scores = _scored(table, one, pool, "test", [*wholes.values(), *parts])
    again = _realigned(table, one, pool, wholes)
    scores |= _scored(table, one, pool, "test", list(again.values())) if again else {}
    for (row, variant), item in again.items():
        one.scores[f"{row}{REALIGNED}", variant, "test"] = scores[item.label]
    for (row, variant), merged in one.merged.items():
        one.scores[row, variant, "test"] = scores[f"{row}/{variant}"]
        if merged.report.get("per_task"):
            of_tasks = {t: scores[f"{row}/{variant}/{t}"][t] for t in merged.report["per_task"]}
            one.scores[f"{row}{OF_TASKS}", variant, "test"] = of_tasks


def _realigned(
    table: Table, one: SetResults, pool: Pool, wholes: Mapping[tuple[str, str], ScoreItem]
) -> dict[tuple[str, str], ScoreItem]:
    """Return the base and each merge read through re-aligned heads, if the recipe wants that."""
    if not table.realigns:
        return {}
    items = {(BASE, DEFAULT): references(one.proven(), one.unseen)[0], **wholes}
    data = realign_data(table.suite, one.experts, table.recipe.sizes.calibration)
    heads = heads_on_ray(pool, list(items.values()), data, table.root / HEADS / one.label)
    return {place: item.realigned(heads[item.label]) for place, item in items.items()}


def _scored(
    table: Table, one: SetResults, pool: Pool, split: str, items: Sequence[ScoreItem]
) -> dict[str, dict[str, TaskScore]]:
    """Score items and the references beside them on one split."""
    limit = table.recipe.sizes.scored(split)
    data = task_data(table.suite, one.experts, split, limit, one.unseen)
    folder = table.root / "scores" / f"{one.label}-{split}"
    scores = score_on_ray(pool, [*references(one.proven(), one.unseen), *items], data, folder)
    standings = Standings.among(scores)
    one.scores[BASE, DEFAULT, split] = standings.base
    one.scores[EXPERT, DEFAULT, split] = standings.expert
    return scores


def _best(one: SetResults, row: MethodRow) -> str:
    """Return the row's variant with the best mean normalised score on validation data."""
    expert = one.scores[EXPERT, DEFAULT, "validation"]
    base = one.scores[BASE, DEFAULT, "validation"]
    means = {
        v.name: standing(one.scores[row.name, v.name, "validation"], expert, base).mean
        for v in one.variants(row)
    }
    # NaN: an expert scored nothing, so nothing can be compared with it.
    return max(means, key=lambda v: -math.inf if math.isnan(means[v]) else means[v])
