"""Rows with `search`: their parameters found by Ray Tune on validation data, a search a set.

search/<set>/<row>/    the search's memory: its trials, and the best as a recipe
"""

from icm_ray.config import AdapterRef, MethodRow, SearchRecipe
from icm_ray.errors import InputError, RecipeError
from icm_ray.methods import find_method
from icm_ray.search.ledger import Ledger
from icm_ray.search.plan import key_of, plan_of, searches_of, study_of
from icm_ray.workflows.pipeline.table import SetResults, Table, Variant, variant_name
from icm_ray.workflows.search.run import run_missing

SEARCHED = ("params.", "weights.")
MAX_NAME = 80
"""Characters of a setting's name, which is a folder's; longer ones are named by their trial."""


def search_rows(table: Table) -> None:
    """Find the setting of each row that searches, for each set of experts."""
    for one in table.sets:
        for row in (row for row in table.rows if row.search):
            one.searched[row.name] = _found(table, one, row)


def check_search(row: MethodRow) -> None:
    """Raise RecipeError if a row searches what a table cannot, or beside a grid."""
    if not row.search:
        return
    problems = [
        f"search.{name}: a table searches {' and '.join(SEARCHED)}<name> alone. Use jobs.search."
        for name in row.search
        if not name.startswith(SEARCHED)
    ]
    if row.grid:
        problems.append("search, grid: both, but one of them chooses the setting.")
    if row.metric:
        problems.append(f"search, metric: {row.metric}, but a search cuts as by default. Use grid.")
    if find_method(row.method).needs in ("learned_merge", "fusion_model"):
        problems.append(f"search: {row.method} learns or trains first. Use jobs.search.")
    if problems:
        raise RecipeError(problems)


def _found(table: Table, one: SetResults, row: MethodRow) -> Variant:
    recipe, folder = table.recipe, table.root / "search" / one.label / row.name
    asked = SearchRecipe(
        base=str(recipe.base or table.suite.base),
        suite=recipe.suite,
        allow_code=recipe.allow_code,
        adapters=[
            AdapterRef(name=task, path=str(expert.adapter))
            for task, expert in one.experts.items()
            if row.tasks is None or task in row.tasks
        ],
        data=table.inputs(row),
        method=row.method,
        params=row.params,
        rank=row.rank,
        search=row.search,
        validation=recipe.sizes.scored("validation"),
        trials=row.trials,
        seed=recipe.seed,
        resources=recipe.resources,
        output=str(folder),
    )
    plan = plan_of(asked)
    (search,) = searches_of(plan, folder)
    study = study_of(plan, search, Ledger(folder, key_of(plan, search)))
    run_missing(plan, [(search, study)], table.session, folder)
    best = study.best()
    if best is None:
        raise InputError(f"{folder}: no trial came to an end. Look at its trials/.")
    point = {name.partition(".")[2]: value for name, value in best.point.items()}
    name = variant_name(point)
    name = name if len(name) <= MAX_NAME else f"trial-{best.number}"
    return Variant(row, dict(search.space.setting(best.point).params), name)
