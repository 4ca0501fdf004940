"""What each job does once its recipe is read: check, connect, work, report."""

from pathlib import Path
from typing import Any

from icm_ray.adapters import open_all
from icm_ray.config import (
    EvaluateRecipe,
    FinetuneRecipe,
    PipelineRecipe,
)
from icm_ray.distributed.actors import AdapterSource, start_actors
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.evaluate import ScoreItem, score_on_ray
from icm_ray.distributed.merge_jobs import base_folder, base_name
from icm_ray.distributed.pipeline import check_rows, run_pipeline
from icm_ray.distributed.reporting import console, publish, report_data
from icm_ray.distributed.rows import task_data
from icm_ray.distributed.shared_base import share_base
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import find_experts
from icm_ray.evaluation.scoring import standing, values
from icm_ray.suites import SUITES


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
    path = base_folder(recipe, recipe.base or suite.base, recipe.revision)
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


def finetune_and_report(recipe: FinetuneRecipe, target: Path) -> dict[str, Any]:
    """Train experts and score them: a pipeline that merges nothing."""
    shared_fields = set(FinetuneRecipe.model_fields) & set(PipelineRecipe.model_fields)
    values_ = {name: getattr(recipe, name) for name in shared_fields}
    # The pipeline wants a method; experts alone are its table without any.
    order = PipelineRecipe.model_construct(**values_, name="experts", experts=None, methods=[])
    return pipeline_and_report(order, target)


def pipeline_and_report(recipe: PipelineRecipe, target: Path) -> dict[str, Any]:
    """Run every missing stage and write the report; a finished run only writes the report."""
    if recipe.suite not in SUITES:
        raise RecipeError(f"suite: {recipe.suite!r} but one of {', '.join(SUITES)} is expected.")
    suite = SUITES[recipe.suite]
    check_rows(recipe)
    spec = recipe.base or suite.base
    path = base_folder(recipe, spec, recipe.revision)
    target.mkdir(parents=True, exist_ok=True)
    with connected(recipe.resources):
        results = run_pipeline(recipe, path, base_name(spec), target)
    data = report_data(results, target)
    outputs = publish(results, data, target)
    console(data)
    for name, where in outputs.items():
        print(f"{name}: {where}")
    return {"outputs": outputs, "scores": data_scores(data)}


def data_scores(data: Any) -> dict[str, Any]:
    """Return mean and worst normalised test score by expert set and row."""
    from icm_ray.report import summarise

    return {
        f"{row.expert_set}/{row.method}{' (tuned)' if row.tuned else ''}": {
            "mean": row.mean,
            "worst": row.worst,
        }
        for row in summarise(data.scores, "test").sets
    }
