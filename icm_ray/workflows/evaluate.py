"""What each job does once its recipe is read: check, connect, work, report."""

from pathlib import Path
from typing import Any

from icm_ray.adapters import open_all
from icm_ray.config import (
    EvaluateRecipe,
)
from icm_ray.distributed.actors import AdapterSource, start_actors
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.scores import ScoreItem, score_on_ray
from icm_ray.distributed.shared_base import share_base
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import find_experts
from icm_ray.evaluation.scoring import standing, task_data, values
from icm_ray.suites import SUITES
from icm_ray.suites.bases import prepare_base


def evaluate_and_report(recipe: EvaluateRecipe, target: Path) -> dict[str, Any]:
    """Score adapters against the experts whose heads they share."""
    if recipe.suite not in SUITES:
        raise RecipeError(f"suite: {recipe.suite!r} but one of {', '.join(SUITES)} is expected.")
    suite = SUITES[recipe.suite]
    experts = find_experts(Path(recipe.experts))
    unknown = sorted(set(experts) - set(suite.tasks))
    if unknown:
        raise RecipeError(f"experts: {', '.join(unknown)}: no task of suite {suite.name!r}.")
    if taken := {ref.name for ref in recipe.adapters} & {"base", "expert"}:
        raise RecipeError(
            f"adapters: {', '.join(sorted(taken))}: a reference. Choose another name."
        )
    refs = [(ref.name, Path(ref.path)) for ref in recipe.adapters]
    own = [(f"expert {task}", expert.adapter) for task, expert in experts.items()]
    sources = {
        name: AdapterSource(name, str(path.absolute()), open_all([(name, path)])[0].fingerprint())
        for name, path in refs
    }
    tasks = tuple(experts)
    items = [ScoreItem("base", None, tasks)]
    items += [ScoreItem(name, source, tasks) for name, source in sources.items()]
    for name, path in own:
        task = name.removeprefix("expert ")
        opened = open_all([(task, path)])[0]
        source = AdapterSource(task, str(path.absolute()), opened.fingerprint())
        items.append(ScoreItem(name, source, (task,)))
    data = task_data(suite, experts, recipe.split, recipe.examples)
    path = prepare_base(recipe.base or suite.base, recipe.cache, recipe.revision, progress=print)
    with connected(recipe.resources):
        shared = share_base(path)
        actors = start_actors(shared, recipe.resources, len(items))
        found = score_on_ray(
            actors,
            items,
            data,
            target / "scores",
            base=shared.run_as(recipe.resources),
            batch=recipe.batch,
            timeout=recipe.resources.timeout_seconds,
        )
    expert = {t: found[f"expert {t}"][t].score.value for t in tasks}
    scores = {}
    for name in sources:
        where = standing(values(found[name]), expert, values(found["base"]))
        scores[name] = {
            "score": values(found[name]),
            "interval": {t: [s.score.low, s.score.high] for t, s in found[name].items()},
            "normalised": dict(where.normalised),
            "gain_kept": dict(where.gain_kept),
            "mean": where.mean,
            "worst": where.worst,
        }
        print(f"{name}: mean {where.mean:.3f}, worst {where.worst:.3f} of the experts")
    references = {"expert": expert, "base": values(found["base"])}
    return {"outputs": {"scores": str(target / "scores")}, "scores": {**references, **scores}}
