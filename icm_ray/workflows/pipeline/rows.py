"""The rows of a results table: merged in parallel, tuned on validation data, then scored once.

A point of a grid is merged inside the actor that scores it; only default settings and what was
chosen become folders.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from icm_ray.adapters import AdapterFile
from icm_ray.config import DataSpec, MethodRow, PipelineRecipe
from icm_ray.distributed.actors import AdapterSource, MergeSource
from icm_ray.distributed.cluster import request, run_bounded, worker_count
from icm_ray.distributed.merge import merge_to_folder
from icm_ray.distributed.progress import bar
from icm_ray.distributed.scores import ScoreItem, score_on_ray
from icm_ray.distributed.shared_base import SharedBase
from icm_ray.evaluation.scoring import TaskScore, standing, task_data, values
from icm_ray.evidence.tensors import given
from icm_ray.files import is_done, sha256_of
from icm_ray.merging.folder import PER_TASK, read_merged
from icm_ray.report.data import OF_TASKS
from icm_ray.suites import Suite
from icm_ray.workflows.pipeline.results import BATCH, DEFAULT, SetResults, order_of, variants


def inputs_spec(recipe: PipelineRecipe, limit: int | None = None) -> DataSpec:
    """Return which unlabelled inputs evidence is gathered from; as many as `limit` if it is set."""
    return DataSpec(suite=recipe.suite, inputs_per_task=limit or recipe.sizes.calibration)


def merge_rows(
    recipe: PipelineRecipe,
    sets: Sequence[SetResults],
    which: Literal["default", "chosen"],
    root: Path,
) -> None:
    """Merge every row of every set into a folder, each in one task; what is there is kept.

    Written, reloaded with PEFT and compared before it counts.
    """
    calls: dict[tuple[int, str, str], Any] = {}
    folders: dict[tuple[int, str, str], Path] = {}
    for index, one in enumerate(sets):
        for row in recipe.methods:
            files = one.files(row.tasks)
            wanted = DEFAULT if which == "default" else one.chosen.get(row.name)
            for variant in (v for v in variants(row) if v.name == wanted):
                key = (index, row.name, variant.name)
                folders[key] = root / "merged" / one.label / row.name / variant.name
                order = order_of(variant, one.evidence(row), recipe.seed)
                mark = sha256_of([_plain(order), {f.name: f.fingerprint() for f in files}])
                if not is_done(folders[key], mark):
                    calls[key] = _call(recipe, files, order, folders[key], mark)
    if calls:
        slots = [None] * worker_count(recipe.resources, len(calls))
        timeout = recipe.resources.timeout_seconds
        with bar(len(calls), "merge") as drawn:
            run_bounded(slots, calls, timeout=timeout, done=lambda _key, _done: drawn.add())
    for (index, row, variant), folder in folders.items():
        sets[index].merged[row, variant] = read_merged(folder)


def _plain(order: Mapping[str, Any]) -> dict[str, Any]:
    told = given(order["evidence"])
    return {**order, "evidence": told.identity if told else None}


def _call(
    recipe: PipelineRecipe, files: list[AdapterFile], order: dict[str, Any], folder: Path, key: str
) -> Any:
    remote = merge_to_folder.options(**request(recipe.resources))
    return lambda _slot: remote.remote(files, order, folder, key)


def choose(
    recipe: PipelineRecipe,
    suite: Suite,
    one: SetResults,
    shared: SharedBase,
    actors: Sequence[Any],
    root: Path,
) -> None:
    """Score every grid on validation data and note the best setting of each row."""
    tuned = [row for row in recipe.methods if row.grid]
    items, labels = [], {}
    for row in tuned:
        files = one.files(row.tasks)
        for variant in variants(row):
            source = MergeSource.of(files, order_of(variant, one.evidence(row), recipe.seed))
            labels[row.name, variant.name] = f"{row.name}/{variant.name}"
            items.append(ScoreItem(labels[row.name, variant.name], source, tuple(one.experts)))
    found = _scored(recipe, suite, one, shared, actors, root, "validation", items)
    for (row, variant), label in labels.items():
        one.scores[row, variant, "validation"] = found[label]
    for row in tuned:
        one.chosen[row.name] = _best(one, row)


def score_test(
    recipe: PipelineRecipe,
    suite: Suite,
    one: SetResults,
    shared: SharedBase,
    actors: Sequence[Any],
    root: Path,
) -> None:
    """Score defaults and what was chosen on test data, per-task adapters under their own name."""
    tasks = tuple(one.experts)
    items = []
    for (row, variant), merged in one.merged.items():
        source = AdapterSource(merged.folder.name, str(merged.folder), merged.fingerprint)
        items.append(ScoreItem(f"{row}/{variant}", source, tasks))
        for task, told in merged.report.get("per_task", {}).items():
            folder = merged.folder / PER_TASK / task
            own = AdapterSource(task, str(folder), told["fingerprint"])
            items.append(ScoreItem(f"{row}/{variant}/{task}", own, (task,)))
    found = _scored(recipe, suite, one, shared, actors, root, "test", items)
    for (row, variant), merged in one.merged.items():
        one.scores[row, variant, "test"] = found[f"{row}/{variant}"]
        if merged.report.get("per_task"):
            of_tasks = {t: found[f"{row}/{variant}/{t}"][t] for t in merged.report["per_task"]}
            one.scores[f"{row}{OF_TASKS}", variant, "test"] = of_tasks


def _scored(
    recipe: PipelineRecipe,
    suite: Suite,
    one: SetResults,
    shared: SharedBase,
    actors: Sequence[Any],
    root: Path,
    split: str,
    items: Sequence[ScoreItem],
) -> dict[str, dict[str, TaskScore]]:
    """Score items and the references beside them on one split."""
    tasks = tuple(one.experts)
    own = [AdapterSource.of(file) for file in one.files()]
    references = [ScoreItem("base", None, tasks)]
    references += [ScoreItem(f"expert {s.name}", s, (s.name,)) for s in own]
    found = score_on_ray(
        actors,
        [*references, *items],
        task_data(suite, one.experts, split, recipe.sizes.scored(split)),
        root / "scores" / f"{one.label}-{split}",
        base=shared.run_as(recipe.resources),
        batch=BATCH,
        timeout=recipe.resources.timeout_seconds,
    )
    one.scores["base", DEFAULT, split] = found["base"]
    one.scores["expert", DEFAULT, split] = {t: found[f"expert {t}"][t] for t in tasks}
    return found


def _best(one: SetResults, row: MethodRow) -> str:
    """Return the row's variant with the best mean normalised score on validation data."""
    expert = values(one.scores["expert", DEFAULT, "validation"])
    base = values(one.scores["base", DEFAULT, "validation"])
    means = {
        v.name: standing(values(one.scores[row.name, v.name, "validation"]), expert, base).mean
        for v in variants(row)
    }
    # NaN: an expert scored nothing, so nothing can be compared with it.
    return max(means, key=lambda v: -math.inf if math.isnan(means[v]) else means[v])
