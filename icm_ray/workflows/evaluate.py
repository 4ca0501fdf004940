"""`jobs.evaluate`: adapters scored on a suite's tasks, beside the tasks' own experts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, check_base, open_all
from icm_ray.config import USUAL_SIZES, AdapterRef, EvaluateRecipe
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.heads import heads_on_ray
from icm_ray.distributed.scores import ScoreItem, Standings, references, score_on_ray
from icm_ray.distributed.session import opened
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import find_experts, heads_of, ready_experts
from icm_ray.evaluation.realigned import realign_data
from icm_ray.evaluation.scoring import TaskData, idle_lines, task_data, values
from icm_ray.kinds import REALIGNED
from icm_ray.learning.tasks import headless
from icm_ray.merging.estimate import warn
from icm_ray.suites import find_suite
from icm_ray.workflows.evicting import evicting, others
from icm_ray.workflows.prepared import check_counts, prepared_base, preparing, with_base


@dataclass(frozen=True)
class Wanted:
    """What a recipe wants scored, checked before any spend.

    Attributes:
        recipe: The recipe, with its base.
        base: The base's folder.
        data: Examples by task, with heads.
        own: The experts' adapters.
        items: The adapters to score.
        realign: Unlabelled inputs by task that heads are fitted on, if they are.
    """

    recipe: EvaluateRecipe
    base: Path
    data: Mapping[str, TaskData]
    own: Sequence[AdapterFile]
    items: Sequence[ScoreItem]
    realign: Mapping[str, TaskData]

    @property
    def everything(self) -> list[ScoreItem]:
        """The references, and what is compared with them."""
        return [*references(self.own), *self.items]


def wanted(recipe: EvaluateRecipe) -> Wanted:
    """Open what a recipe names.

    Raises:
        RecipeError: an expert has no task or no head, or an adapter is named as a reference is.
        InputError: an adapter, the suite or the base is not as it should be.
    """
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
    if taken := sorted(name for name in names if _is_reference(name)):
        raise RecipeError(f"adapters: {', '.join(taken)}: a reference. Choose another name.")
    if problems := headless(suite, experts):
        raise RecipeError(problems)
    # One by one: they need not fit together to be scored.
    files = [open_all([ref.pair], run_by="jobs.evaluate")[0] for ref in recipe.adapters]
    own = [
        open_all([(task, expert.adapter)], run_by="jobs.evaluate")[0]
        for task, expert in experts.items()
    ]
    items = [ScoreItem(file.name, AdapterSource(file), tuple(experts)) for file in files]
    limit = suite.limit(recipe.examples, USUAL_SIZES[recipe.split])
    limits = {recipe.split: limit}
    if recipe.realign_heads:
        limits["calibration"] = suite.limit(None, USUAL_SIZES["calibration"])
    check_counts(suite, experts, limits)
    recipe = with_base(recipe, suite, own)
    base = prepared_base(recipe, suite, heads_of(suite, experts)[1], list(limits))
    check_base([*own, *files], base)
    data = task_data(suite, experts, recipe.split, limit)
    realign = {}
    if recipe.realign_heads:
        realign = realign_data(suite, experts, limits["calibration"])
    return Wanted(recipe, base, data, own, items, realign)


def _is_reference(name: str) -> bool:
    return name in ("base", "expert") or name.startswith("expert ") or name.endswith(REALIGNED)


def run(recipe: EvaluateRecipe, target: Path) -> dict[str, Any]:
    """Score adapters against the experts whose heads they share."""
    return evicting(recipe, _without, lambda rest, _evicted: _score(rest, target))


def _without(recipe: EvaluateRecipe, names: Collection[str]) -> EvaluateRecipe | None:
    """Return a recipe without some tasks' experts, and without adapters of these names."""
    experts = recipe.experts
    if isinstance(experts, str):
        found = find_experts(Path(experts)).items()
        experts = [AdapterRef(name=task, path=str(one.adapter)) for task, one in found]
    meets = find_suite(recipe.suite).experts_of([ref.name for ref in experts])
    gone = {*names, *(meets[task] for task in names if task in meets)}
    left, adapters = others(experts, gone), others(recipe.adapters, names)
    same = len(left) == len(experts) and len(adapters) == len(recipe.adapters)
    if same or not left or not adapters:
        return None
    return recipe.model_copy(update={"experts": left, "adapters": adapters})


def _score(recipe: EvaluateRecipe, target: Path) -> dict[str, Any]:
    asked = wanted(recipe)
    recipe, names = asked.recipe, [ref.name for ref in recipe.adapters]
    with (
        opened(recipe.resources, asked.base, recipe.seed, preparing(recipe)) as session,
        session.pool(len(asked.items) + len(asked.own) + 1) as pool,
    ):
        place = target / "scores"
        # Scored first: what kills a worker is told apart there, by task.
        found = score_on_ray(pool, asked.everything, asked.data, place, recipe.batch)
        again = [references(asked.own)[0], *asked.items] if asked.realign else []
        heads = heads_on_ray(pool, again, asked.realign, target / "heads", recipe.batch)
        again = [item.realigned(heads[item.label]) for item in again]
        found |= score_on_ray(pool, again, asked.data, place, recipe.batch)
    standings = Standings.among(found)
    warn(idle_lines(standings.expert, standings.base))
    scores: dict[str, Any] = {
        "expert": values(standings.expert),
        "base": values(standings.base),
    }
    for name in [*names, *(item.label for item in again)]:
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
    outputs = {"scores": str(target / "scores")}
    outputs |= {"heads": str(target / "heads")} if again else {}
    return {"outputs": outputs, "scores": scores}
