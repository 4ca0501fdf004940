"""`jobs.evaluate`: adapters scored on a suite's tasks, beside the tasks' own experts."""

from pathlib import Path
from typing import Any

from icm_ray.adapters import open_all
from icm_ray.config import USUAL_SIZES, EvaluateRecipe
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.scores import ScoreItem, Standings, references, score_on_ray
from icm_ray.distributed.session import opened
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import find_experts, heads_of, ready_experts
from icm_ray.evaluation.scoring import idle_lines, task_data, values
from icm_ray.learning.tasks import headless
from icm_ray.merging.estimate import warn
from icm_ray.suites import find_suite
from icm_ray.workflows.prepared import check_counts, fetching, prepared_base, with_base


def run(recipe: EvaluateRecipe, target: Path) -> dict[str, Any]:
    """Score adapters against the experts whose heads they share."""
    suite = find_suite(recipe.suite)
    if isinstance(recipe.experts, str):
        experts = find_experts(Path(recipe.experts))
    else:
        given = ready_experts(ref.pair for ref in recipe.experts)
        meets = suite.experts_of(given)
        experts = {task: given[name] for task, name in meets.items()}
        experts |= {name: given[name] for name in given.keys() - {*meets.values()}}
    names = [ref.name for ref in recipe.adapters]
    if unknown := sorted(set(experts) - set(suite.tasks)):
        raise RecipeError(f"experts: {', '.join(unknown)}: no task of suite {suite.name!r}.")
    if taken := sorted(n for n in names if n in ("base", "expert") or n.startswith("expert ")):
        raise RecipeError(f"adapters: {', '.join(taken)}: a reference. Choose another name.")
    if problems := headless(suite, experts):
        raise RecipeError(problems)
    # One by one: they need not fit together to be scored.
    files = [open_all([ref.pair], heads=True)[0] for ref in recipe.adapters]
    own = [open_all([(task, expert.adapter)], heads=True)[0] for task, expert in experts.items()]
    items = [ScoreItem(file.name, AdapterSource(file), tuple(experts)) for file in files]
    limit = suite.limit(recipe.examples, USUAL_SIZES[recipe.split])
    check_counts(suite, experts, {recipe.split: limit})
    heads = heads_of(suite, experts)[1]
    recipe = with_base(recipe, suite, own)
    base = prepared_base(recipe, suite, heads, [recipe.split])
    prepare = fetching(recipe)
    data = task_data(suite, experts, recipe.split, limit)
    with (
        opened(recipe.resources, base, recipe.seed, prepare) as session,
        session.pool(len(items) + len(own) + 1) as pool,
    ):
        everything = [*references(own), *items]
        found = score_on_ray(pool, everything, data, target / "scores", recipe.batch)
    standings = Standings.among(found)
    warn(idle_lines(standings.expert, standings.base))
    scores: dict[str, Any] = {
        "expert": values(standings.expert),
        "base": values(standings.base),
    }
    for name in names:
        where, own_scores = standings.of(name), standings.items[name]
        scores[name] = {
            "score": values(own_scores),
            "interval": {t: [s.score.low, s.score.high] for t, s in own_scores.items()},
            "normalised": dict(where.normalised),
            "gain_kept": dict(where.gain_kept),
            "mean": where.mean,
            "worst": where.worst,
        }
        print(f"{name}: mean {where.mean:.3f}, worst {where.worst:.3f} of the experts")
    return {"outputs": {"scores": str(target / "scores")}, "scores": scores}
