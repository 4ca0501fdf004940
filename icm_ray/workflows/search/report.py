"""From a study to the plain values of its page, and one table over several searches."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icm_ray.files import whole_folder
from icm_ray.report.search_data import Objective, SearchData, TrialRow
from icm_ray.report.search_page import write_search
from icm_ray.report.text import markdown, number
from icm_ray.search.ledger import Trial
from icm_ray.search.objectives import AIMS, better
from icm_ray.search.plan import Plan, Search
from icm_ray.search.recipes import BEST
from icm_ray.search.study import Study

REPORT, TABLE = "report", "table.md"


def publish(search: Search, study: Study, result: Mapping[str, Any]) -> None:
    """Write a search's page, table and Parquet."""
    with whole_folder(search.folder / REPORT) as folder:
        write_search(search_data(search, study, result), folder)


def search_data(search: Search, study: Study, result: Mapping[str, Any]) -> SearchData:
    """Collect everything the page shows."""
    names = study.objectives
    best = study.best()
    assert best is not None
    return SearchData(
        title=f"Search: {search.row.name}, {len(study.finished())} trials",
        command="python -m jobs.search -c <this recipe>",
        objectives=[
            Objective(
                name,
                "higher is better" if AIMS[name].direction == "maximize" else "lower is better",
                AIMS[name].meaning,
            )
            for name in names
        ],
        trials=[_row(study, trial) for trial in study.finished()],
        best=best.number,
        recipe=(search.folder / BEST).read_text(encoding="utf-8"),
        front=[trial.number for trial in study.front()] if len(names) > 1 else [],
        importance=study.importance(),
        standing={split: result[split] for split in ("validation", "test") if split in result},
    )


def _row(study: Study, trial: Trial) -> TrialRow:
    return TrialRow(
        trial.number,
        trial.state,
        trial.origin,
        study.space.setting(trial.point).method,
        trial.point,
        trial.metrics,
        trial.scores,
        trial.node,
        trial.seconds,
        trial.error,
    )


def publish_table(
    plan: Plan,
    pairs: Sequence[tuple[Search, Study]],
    scores: Mapping[str, Mapping[str, Any]],
    target: Path,
) -> Path:
    """Write the table of several searches: each row's grid beside its searches, as Markdown."""
    name = plan.recipe.objectives[0]
    head = ["row", "trials", "grid", "search", "seeds better", "grid, test", "search, test"]
    lines = [head, ["---", "---:", "---:", "---:", "---:", "---:", "---:"]]
    won = compared = 0
    for row, _ in plan.rows:
        mine = [(search, study) for search, study in pairs if search.row.name == row.name]
        grid = [_best(study, name) for search, study in mine if search.seed is None]
        searched = [_best(study, name) for search, study in mine if search.seed is not None]
        wins = sum(better(name, value, grid[0]) for value in searched) if grid else 0
        # A row's search is better if its mean over seeds is.
        compared += bool(grid)
        won += bool(grid) and better(name, statistics.fmean(searched), grid[0])
        trials = max(len(study.finished()) for search, study in mine if search.seed is not None)
        tests = [
            [scores[s.output]["test"]["mean"] for s, _ in mine if (s.seed is None) is is_grid]
            if plan.recipe.test
            else []
            for is_grid in (True, False)
        ]
        wins_told = f"{wins} of {len(searched)}" if grid else ""
        lines.append(
            [markdown(row.name), str(trials), *map(_spread, (grid, searched)), wins_told]
            + [_spread(values) for values in tests]
        )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    summary = (
        f"Best {name} ({AIMS[name].meaning}); mean over seeds, lowest and highest in brackets.\n"
    )
    summary += f"Better than the grid on average over seeds: {won} of {compared} rows.\n"
    path = target / TABLE
    path.write_text(f"{summary}\n{text}\n", encoding="utf-8")
    print(f"{summary}\n{text}")
    return path


def _best(study: Study, name: str) -> float:
    best = study.best()
    assert best is not None
    return best.metrics[name]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = number(statistics.fmean(values), 4)
    if len(values) == 1:
        return mean
    return f"{mean} ({number(min(values), 4)} .. {number(max(values), 4)})"
