"""What all trials of a search share, gathered once: evidence, inputs, heads, references."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.evidence import checkpoints_on_ray, grams_on_ray
from icm_ray.distributed.scores import ScoreItem, score_on_ray
from icm_ray.distributed.shared_base import SharedBase
from icm_ray.evaluation.scoring import task_data
from icm_ray.evidence.tensors import TENSORS
from icm_ray.fusion.serial import Checkpoints
from icm_ray.learning.tasks import EVIDENCE_BATCH, load_inputs
from icm_ray.search.measuring import BATCH, Material
from icm_ray.search.plan import Plan


def gather_material(
    plan: Plan, shared: SharedBase, actors: Sequence[Any], target: Path
) -> Material:
    """Gather what all trials share: evidence, inputs, heads, and the references' predictions."""
    recipe, tasks = plan.recipe, [file.name for file in plan.files]
    inputs, heads, labels, grams, scored, references = {}, {}, {}, {}, {}, {}
    if plan.needs("inputs"):
        assert recipe.data is not None
        inputs = load_inputs(recipe.data, tasks)
    if plan.needs("heads"):
        heads = {t: (plan.suite.tasks[t], plan.experts[t].head()) for t in tasks}
    if plan.needs("labels"):
        assert recipe.data is not None
        split, limit = recipe.data.split, recipe.data.inputs_per_task
        labels = {t: plan.suite.load(t, split, limit).targets.tolist() for t in tasks}
    if plan.needs("grams"):
        grams = load_file(_grams(plan, inputs, shared, actors, target) / TENSORS)
    if plan.needs("validation"):
        scored = task_data(plan.suite, plan.experts, "validation", recipe.validation)
        references = _references(plan, scored, shared, actors, target / "scores")
    return Material(
        [file.load() for file in plan.files],
        inputs,
        heads,
        labels,
        grams,
        scored,
        references,
        recipe.seed,
        recipe.resources.threads,
        recipe.layer_groups,
        _checkpoints(plan, inputs, actors) if plan.needs("fusion") else None,
    )


def _grams(
    plan: Plan, inputs: Any, shared: SharedBase, actors: Sequence[Any], target: Path
) -> Path:
    recipe = plan.recipe
    return grams_on_ray(
        actors,
        [AdapterSource.of(file, recipe.modules_to_save) for file in plan.files],
        sorted({module for file in plan.files for module in file.shapes}),
        inputs,
        target.with_name(f"{target.name}.grams"),
        base=shared.run_as(recipe.resources),
        batch=EVIDENCE_BATCH,
        timeout=recipe.resources.timeout_seconds,
    )


def _checkpoints(plan: Plan, inputs: Any, actors: Sequence[Any]) -> Checkpoints:
    recipe = plan.recipe
    return checkpoints_on_ray(
        actors,
        plan.files,
        recipe.modules_to_save,
        inputs,
        plan.trajectories,
        recipe.resources.timeout_seconds,
    )


def _references(
    plan: Plan, data: Any, shared: SharedBase, actors: Sequence[Any], folder: Path
) -> dict[str, dict[str, Any]]:
    """Return predictions of the base, and of each expert on its own task."""
    tasks = tuple(sorted(data))
    own = [AdapterSource.of(file, plan.recipe.modules_to_save) for file in plan.files]
    items = [ScoreItem("base", None, tasks)]
    items += [ScoreItem(f"expert {s.name}", s, (s.name,)) for s in own]
    found = score_on_ray(
        actors,
        items,
        data,
        folder,
        base=shared.run_as(plan.recipe.resources),
        batch=BATCH,
        timeout=plan.recipe.resources.timeout_seconds,
    )
    return {
        "base": {t: found["base"][t].predictions for t in tasks},
        "expert": {t: found[f"expert {t}"][t].predictions for t in tasks},
    }
