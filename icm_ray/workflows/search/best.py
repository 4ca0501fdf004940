"""The best of a search: always on disk as a recipe, in the end merged, verified and scored."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icm_ray.adapters import open_adapter
from icm_ray.config import SearchRecipe
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.scores import ScoreItem, Standings, references, score_on_ray
from icm_ray.distributed.session import Session
from icm_ray.evaluation.scoring import Standing, task_data
from icm_ray.files import sha256_of
from icm_ray.learning.recipes import needs_grams, spec_of
from icm_ray.search.ledger import Trial
from icm_ray.search.plan import Plan, Search
from icm_ray.search.recipes import (
    BEST,
    EVIDENCE,
    MERGED,
    fusion_recipe,
    is_learned_apart,
    learn_recipe,
    merge_recipe,
    write_recipe,
)
from icm_ray.search.study import Study
from icm_ray.workflows import learn, merge, train_fusion
from icm_ray.workflows.search.report import publish, publish_table

FRONT = "front"


def note_best(plan: Plan, search: Search, study: Study) -> None:
    """Write the best complete trial as a recipe that runs, unless it is there already."""
    best = study.best()
    if best is not None:
        _write_recipes(plan, search, best, search.folder / BEST)


def _write_recipes(plan: Plan, search: Search, trial: Trial, path: Path) -> None:
    setting, recipe = search.space.setting(trial.point), _recipe(plan, search)
    name = plan.recipe.objectives[0]
    note = f"Trial {trial.number}: {name} {trial.metrics[name]:.6g}."
    if path.is_file() and path.read_text(encoding="utf-8").startswith(f"# {note}"):
        return
    note += " Run it with python -m jobs.merge -c this file."
    if is_learned_apart(setting):
        apart = learn_recipe(setting, recipe, plan.refs)
        place = path.with_suffix(".learn.yaml")
        write_recipe(place, apart, "Run this one first, with jobs.learn.")
    if setting.fuses:
        apart = fusion_recipe(setting, recipe, plan.refs)
        place = path.with_suffix(".train_fusion.yaml")
        write_recipe(place, apart, "Run this one first, with jobs.train_fusion.")
    write_recipe(path, merge_recipe(setting, recipe, plan.refs), note)


def _recipe(plan: Plan, search: Search) -> SearchRecipe:
    return plan.recipe.model_copy(update={"output": search.output})


def finish(
    plan: Plan, pairs: Sequence[tuple[Search, Study]], session: Session, target: Path
) -> dict[str, Any]:
    """Merge and score what won, write the pages, and say what was found."""
    for search, study in pairs:
        note_best(plan, search, study)
        _merge_best(plan, search, study, target)
        for trial in study.front() if len(study.objectives) > 1 else ():
            (search.folder / FRONT).mkdir(exist_ok=True)
            place = search.folder / FRONT / f"{trial.number:05d}.yaml"
            _write_recipes(plan, search, trial, place)
    searches = [search for search, _ in pairs]
    standings = _scored(plan, searches, session, target) if plan.is_scored else {}
    scores: dict[str, Any] = {}
    for search, study in pairs:
        scores[search.output] = _result(study, standings.get(search.output, {}))
        publish(search, study, scores[search.output])
    outputs = {"adapter": str(target / MERGED), "report": str(target / "report" / "index.html")}
    if plan.recipe.rows:
        outputs = {"table": str(publish_table(plan, pairs, scores, target))}
    return {"outputs": outputs, "scores": scores}


def _merge_best(plan: Plan, search: Search, study: Study, target: Path) -> None:
    """Merge as jobs.merge does with best.yaml; a merge that is there and right is kept."""
    best = study.best()
    assert best is not None, "a search without a complete trial has ended before"
    setting, recipe = search.space.setting(best.point), _recipe(plan, search)
    mark = search.folder / f".{MERGED}.trial"
    key = sha256_of([best.number, repr(setting)])
    if mark.is_file() and mark.read_text() == key and (search.folder / MERGED).is_dir():
        return
    grams = target.with_name(f"{target.name}.grams")
    if grams.is_dir():
        learned = setting.learns and needs_grams(spec_of(setting.method, setting.learn))
        place = search.folder / (f"{EVIDENCE}.grams" if learned else EVIDENCE)
        if not place.exists():
            shutil.copytree(grams, place, copy_function=os.link)
    if is_learned_apart(setting):
        learn.run(learn_recipe(setting, recipe, plan.refs), search.folder / EVIDENCE)
    if setting.fuses:
        train_fusion.run(fusion_recipe(setting, recipe, plan.refs), search.folder / EVIDENCE)
    order = merge_recipe(setting, recipe, plan.refs)
    if order.evidence is not None:  # as the output is: where this run has it
        order = order.model_copy(update={"evidence": str(search.folder / EVIDENCE)})
    merge.run(order, search.folder / MERGED)
    mark.write_text(key)


def _scored(
    plan: Plan, searches: Sequence[Search], session: Session, target: Path
) -> dict[str, dict[str, Standing]]:
    """Return where each search's merge stands on validation data, and once on test data."""
    recipe, tasks = plan.recipe, tuple(sorted(plan.experts))
    limit = plan.suite.limit(recipe.validation, recipe.most)
    sizes: dict[str, int | None] = {
        "validation": limit,
        **({"test": recipe.test} if recipe.test else {}),
    }
    places = {"validation": target / "scores", "test": target / "scores" / "test"}
    items = references(plan.proven)
    for search in searches:
        source = AdapterSource(open_adapter(search.folder / MERGED))
        items.append(ScoreItem(search.output, source, tasks))
    standings: dict[str, dict[str, Standing]] = {search.output: {} for search in searches}
    with session.pool(len(items)) as pool:
        for split, size in sizes.items():
            data = task_data(plan.suite, plan.experts, split, size)
            known = Standings.among(score_on_ray(pool, items, data, places[split]))
            for search in searches:
                standings[search.output][split] = known.of(search.output)
    return standings


def _result(study: Study, standings: Mapping[str, Standing]) -> dict[str, Any]:
    """Return what `results.json` says of a search."""
    best = study.best()
    assert best is not None
    result: dict[str, Any] = {
        "trial": best.number,
        "point": dict(best.point),
        "metrics": dict(best.metrics),
        "trials": {
            state: sum(t.state == state for t in study.finished())
            for state in ("complete", "stopped", "failed")
        },
        "failed": {t.number: t.error for t in study.finished() if t.state == "failed"},
    }
    for split, where in standings.items():
        result[split] = {
            "mean": where.mean,
            "worst": where.worst,
            "normalised": dict(where.normalised),
        }
    return result
