"""Rows of method icm_fusion: a Fusion-VAE a set and recipe, and what is adapted from it in context.

Rows with the same recipe share a Fusion-VAE. It is trained on every task of the set, from the
checkpoints that fine-tuning left or else from the adapters alone; a row's `tasks` are then fused
without training again.

fusion/<set>/<recipe's hash>/   the Fusion-VAE
learned/<set>/<row>/            what a row with `in_context` adapted from it
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from icm_ray.config import INPUT_BATCH, MethodRow, PipelineRecipe
from icm_ray.distributed.cluster import request, run_bounded, worker_count
from icm_ray.distributed.fusion_trainer import OneWorkerOrder, train_on_one_worker
from icm_ray.distributed.shared_base import SharedBase
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import TRAJECTORIES
from icm_ray.files import is_done, sha256_of
from icm_ray.fusion.in_context import Context, context_specs
from icm_ray.fusion.latent import check_beneath
from icm_ray.fusion.material import content_of
from icm_ray.fusion.serial import (
    HEAD_LOSSES,
    fusion_spec_of,
    reads_heads,
    runs_base,
)
from icm_ray.learning.recipes import LABELLED
from icm_ray.learning.tasks import load_inputs, readable_experts, task_inputs
from icm_ray.merging.estimate import warn
from icm_ray.methods import find_method
from icm_ray.methods.table import FUSES
from icm_ray.suites import Suite
from icm_ray.workflows.pipeline.learned import learn_row
from icm_ray.workflows.pipeline.results import SetResults
from icm_ray.workflows.pipeline.rows import inputs_spec

VERSION = 2


def fusion_rows(recipe: PipelineRecipe) -> list[MethodRow]:
    """Return the rows that merge with a Fusion-VAE."""
    return [row for row in recipe.methods if find_method(row.method).needs == FUSES]


def fuse_rows(
    recipe: PipelineRecipe,
    suite: Suite,
    sets: Sequence[SetResults],
    vectors: Mapping[str, Mapping[str, Tensor]],
    base: Path,
    shared: SharedBase,
    root: Path,
) -> list[SetResults]:
    """Return the sets with the evidence of each fusion row.

    Args:
        recipe: The table.
        suite: Its tasks.
        sets: The experts.
        vectors: Task vectors by set and task.
        base: Folder of the base, for its tokenizer.
        shared: The base in the object store.
        root: Output of the pipeline.
    """
    trained = _train_all(recipe, suite, sets, vectors, base, shared, root)
    found = []
    for one in sets:
        folders = {row.name: trained[one.label, _name(row)] for row in fusion_rows(recipe)}
        for row in fusion_rows(recipe):
            if row.in_context:
                latent, direct = context_specs(row.in_context, row.learn)
                context = Context(folders[row.name], direct)
                folders[row.name] = learn_row(
                    recipe, suite, one, row, latent, base, shared, root, context
                )
        found.append(replace(one, fused=folders))
    return found


def check_fusion_row(row: MethodRow) -> None:
    """Raise RecipeError if a row's `fusion` or `in_context` is wrong, or would do nothing."""
    if find_method(row.method).needs != FUSES:
        raise RecipeError("fusion, in_context: only method icm_fusion has a Fusion-VAE.")
    spec = fusion_spec_of(row.fusion)
    latent, _ = context_specs(row.in_context, row.learn)
    if latent.start.residual:
        check_beneath(spec.representation.gauge)
    if row.learn and not row.in_context:
        raise RecipeError("learn: changes in_context, which is not set.")
    if row.in_context and {*row.params, *row.grid} - {"scale"}:
        raise RecipeError("params, grid: in_context starts from rule mean; only scale acts.")
    if row.inputs and not row.in_context:
        raise RecipeError("inputs: are seen in_context, which is not set.")


def _name(row: MethodRow) -> str:
    return sha256_of(fusion_spec_of(row.fusion).model_dump())[:12]


def _train_all(
    recipe: PipelineRecipe,
    suite: Suite,
    sets: Sequence[SetResults],
    vectors: Mapping[str, Mapping[str, Tensor]],
    base: Path,
    shared: SharedBase,
    root: Path,
) -> dict[tuple[str, str], Path]:
    """Return the Fusion-VAEs by set and recipe, trained at the same time where there is room."""
    specs = {_name(row): fusion_spec_of(row.fusion) for row in fusion_rows(recipe)}
    folders: dict[tuple[str, str], Path] = {}
    calls: dict[tuple[str, str], Any] = {}
    data = inputs_spec(recipe)
    for one in sets:
        files, trajectories = one.files(), _trajectories(one, root)
        inputs = load_inputs(data, list(one.experts))
        for name, spec in specs.items():
            folder = folders[one.label, name] = root / "fusion" / one.label / name
            readable = readable_experts(
                suite,
                one.experts,
                one.experts if reads_heads(spec) else (),
                data,
                labelled=HEAD_LOSSES.get(spec.inner.loss) in LABELLED,
            )
            content = content_of(spec, files, trajectories, inputs, readable)
            key = sha256_of({**content, **_common(recipe, shared)})
            if is_done(folder, key):
                continue
            if not trajectories:
                warn([f"fusion {one.label}: no trajectories, so from the adapters alone."])
            through_base = runs_base(spec)
            tasks = task_inputs(files, inputs, readable, base, INPUT_BATCH) if through_base else ()
            order = OneWorkerOrder(spec, files, trajectories, vectors[one.label], tasks, key)
            label = f"{one.label} {name}"
            calls[one.label, name] = _call(shared, recipe, order, folder, label)
    slots = [None] * worker_count(recipe.resources, max(len(calls), 1))
    run_bounded(slots, calls, timeout=recipe.resources.timeout_seconds)
    return folders


def _common(recipe: PipelineRecipe, shared: SharedBase) -> dict[str, Any]:
    return {
        "version": VERSION,
        "base": shared.run_as(recipe.resources),
        "seed": recipe.seed,
        "threads": recipe.resources.threads,
    }


def _call(
    shared: SharedBase, recipe: PipelineRecipe, order: OneWorkerOrder, folder: Path, label: str
) -> Any:
    options = request(recipe.resources)
    return lambda _slot: train_on_one_worker.options(**options).remote(
        shared, recipe, order, folder, label
    )


def _trajectories(one: SetResults, root: Path) -> dict[str, Path]:
    """Return the folders of checkpoints by task; all or none, else tasks would weigh unequally."""
    found = {task: root / TRAJECTORIES / one.label / task for task in one.experts}
    return found if all(folder.is_dir() for folder in found.values()) else {}
