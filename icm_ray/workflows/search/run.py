"""A search from its recipe to a proven adapter: checks, material, trials, the best one, a page.

<output>/search.json       whose memory this is
        trials/            one file a trial
        best.yaml          the best merge so far, for jobs.merge
        adapter/           that merge, verified
        scores/            validation and test scores of references and of the best
        report/            the page, the table, Parquet
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from icm_ray.adapters import check_base
from icm_ray.config import SearchRecipe
from icm_ray.config.places import earlier_output
from icm_ray.distributed.loggers import check_loggers
from icm_ray.distributed.progress import bar
from icm_ray.distributed.session import Session, opened
from icm_ray.distributed.trials import share_material
from icm_ray.distributed.tune import Bench, Looks, TrialsOrder, run_trials, wait_for_actors
from icm_ray.errors import InputError
from icm_ray.evaluation.experts import heads_of
from icm_ray.learning.recipes import spec_of
from icm_ray.merging.estimate import unproven_lines, warn, warnings_of
from icm_ray.search.ledger import Ledger
from icm_ray.search.objectives import SCORED, rungs
from icm_ray.search.plan import Plan, Search, key_of, plan_of, searches_of, study_of, trials_of
from icm_ray.search.study import Study, optuna
from icm_ray.suites import SPLITS
from icm_ray.workflows.prepared import prepared_base, preparing
from icm_ray.workflows.search.best import finish, note_best
from icm_ray.workflows.search.material import gather_material

WAIT_FOR_ACTORS = 300.0


def run(recipe: SearchRecipe, target: Path) -> dict[str, Any]:
    """Run every trial that is missing, then merge, verify and report the best; see SearchRecipe."""
    plan, base = asked_of(recipe)
    warn(warnings_of(plan.files))
    if plan.is_scored:
        warn(unproven_lines({file.name for file in plan.files} - plan.experts.keys()))
    searches = searches_of(plan, target)
    ledgers = [Ledger(one.folder, key_of(plan, one)) for one in searches]
    place = partial(earlier_output, recipe.storage)
    pairs = [(s, study_of(plan, s, one, place)) for s, one in zip(searches, ledgers, strict=True)]
    with opened(recipe.resources, base, recipe.seed, preparing(recipe)) as session:
        run_missing(plan, pairs, session, target)
        return finish(plan, pairs, session, target)


def asked_of(recipe: SearchRecipe) -> tuple[Plan, Path]:
    """Open what a recipe names; return it and the base's folder.

    Raises:
        RecipeError, InputError: see `plan_of`; or a library is missing, or adapters or heads do not
            go with the base.
    """
    optuna()
    check_loggers(recipe.loggers)
    plan = plan_of(recipe)
    suite = plan.suite if recipe.suite is not None else None
    heads = heads_of(suite, plan.experts)[1] if suite else {}
    base = prepared_base(recipe, suite, heads, SPLITS[1:])
    check_base(plan.files, base)
    return plan, base


def run_missing(
    plan: Plan, pairs: Sequence[tuple[Search, Study]], session: Session, target: Path
) -> None:
    """Run the missing trials of every search on one set of actors."""
    recipe = plan.recipe
    missing = [
        (search, study, trials)
        for search, study in pairs
        if (trials := trials_of(recipe, search, study)) > len(study.finished())
    ]
    if not missing:
        return
    items = max(len(plan.files), *(trials for *_, trials in missing))
    with session.pool(items) as pool:
        wait_for_actors(pool.actors, min(WAIT_FOR_ACTORS, recipe.resources.timeout_seconds))
        material = share_material(gather_material(plan, pool, target))
        for search, study, trials in missing:
            _run(plan, search, study, Bench(pool.actors, material), trials)


def _run(plan: Plan, search: Search, study: Study, bench: Bench, trials: int) -> None:
    recipe = plan.recipe
    label = f"search {search.output.rpartition('/')[2]}"
    with bar(trials, label) as drawn:
        drawn.reach(len(study.finished()))

        def finished(_trial: Any) -> None:
            note_best(plan, search, study)
            drawn.add()

        logs = search.folder.with_name(f"{search.folder.name}.logs") if recipe.loggers else None
        timeout = recipe.resources.timeout_seconds
        order = TrialsOrder(looks_of(recipe, search), trials, timeout, tuple(recipe.loggers), logs)
        run_trials(study, bench, order, finished)
    if not study.complete():
        errors = [trial.error for trial in study.finished() if trial.error]
        raise InputError(
            f"{search.output}: none of {len(study.finished())} trials came to an end. The first "
            f"said: {errors[0] if errors else 'nothing'}"
        )


def looks_of(recipe: SearchRecipe, search: Search) -> Looks:
    """Return the rungs of a search; a grid is always looked at whole."""
    halving = recipe.halving
    if halving is None or search.seed is None:
        return Looks("all", (1,))
    last = recipe.most
    if halving.by == "steps":
        last = max(spec_of(m, search.row.learn).optimisation.steps for m in search.space.methods)
    elif not set(recipe.objectives) & set(SCORED) and recipe.data is not None:
        last = recipe.data.most
    return Looks(halving.by, tuple(rungs(halving.first, halving.factor, last)), halving.factor)
