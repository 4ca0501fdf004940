"""Rows of method icm_fusion: a Fusion-VAE a set and recipe, and what is adapted from it in context.

Rows with the same recipe share a Fusion-VAE. It is trained on every task of the set, from the
checkpoints that fine-tuning left or else from the adapters alone; a row's `tasks` are then fused
without training again.

fusion/<set>/<recipe's hash>/   the Fusion-VAE
learned/<set>/<row>/            what a row with `in_context` adapted from it
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from icm_ray.adapters import AdapterFile
from icm_ray.config import INPUT_BATCH, FusionSpec, MethodRow, PipelineRecipe
from icm_ray.distributed.cluster import MAX_RETRIES, request, run_bounded, worker_count
from icm_ray.distributed.evidence import load_inputs
from icm_ray.distributed.fusion_material import content_of
from icm_ray.distributed.in_context import Context, context_specs
from icm_ray.distributed.learn import readable_experts, task_inputs
from icm_ray.distributed.learned_rows import learn_row
from icm_ray.distributed.rows import SetResults, inputs_spec
from icm_ray.distributed.shared_base import SharedBase, rebuild
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import TRAJECTORIES
from icm_ray.files import RUN_FILE, is_done, sha256_of, write_json
from icm_ray.fusion.latent import check_beneath
from icm_ray.fusion.serial import (
    FUSES,
    HEAD_LOSSES,
    Checkpoints,
    fusion_spec_of,
    reads_heads,
    runs_base,
    train_fusion,
)
from icm_ray.fusion.store import save_fusion
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.recipes import LABELLED
from icm_ray.linalg.threads import kernel_threads
from icm_ray.methods.merge import find_method
from icm_ray.planning import warn
from icm_ray.suites import Suite

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


@dataclass(frozen=True)
class _Order:
    """One training, as its worker gets it."""

    spec: FusionSpec
    files: Sequence[AdapterFile]
    trajectories: Mapping[str, Path]
    vectors: Mapping[str, Tensor]
    tasks: Sequence[TaskInputs]
    key: str


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
            order = _Order(spec, files, trajectories, vectors[one.label], tasks, key)
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
    shared: SharedBase, recipe: PipelineRecipe, order: _Order, folder: Path, label: str
) -> Any:
    options = request(recipe.resources)
    return lambda _slot: _train.options(**options).remote(shared, recipe, order, folder, label)


@ray.remote(max_retries=MAX_RETRIES)
def _train(
    shared: SharedBase, recipe: PipelineRecipe, order: _Order, folder: Path, label: str
) -> None:
    from ray.experimental import tqdm_ray

    started = time.process_time()
    scratch = folder.with_name(f".{folder.name}.training-{order.key[:12]}")
    scratch.mkdir(parents=True, exist_ok=True)
    adapters = [file.load() for file in order.files]
    known = Checkpoints.read(adapters, order.trajectories, order.vectors)
    bar = tqdm_ray.tqdm(total=order.spec.steps, desc=f"fusion {label}", flush_interval_s=3.0)
    with kernel_threads(recipe.resources.threads):
        base = rebuild(shared, recipe.resources) if runs_base(order.spec) else None
        try:
            model = train_fusion(
                order.spec,
                adapters,
                known,
                base=base,
                tasks=order.tasks,
                seed=recipe.seed,
                threads=recipe.resources.threads,
                scratch=scratch,
                key=order.key,
                progress=lambda step, _loss: bar.update(step - bar._x),
            )
        except RecipeError:  # of other settings there is nothing to resume
            shutil.rmtree(scratch)
            raise
    bar.close()
    save_fusion(model, folder, {"key": order.key})
    write_json(folder / RUN_FILE, {"cpu_seconds": time.process_time() - started})
    shutil.rmtree(scratch)


def _trajectories(one: SetResults, root: Path) -> dict[str, Path]:
    """Return the folders of checkpoints by task; all or none, else tasks would weigh unequally."""
    found = {task: root / TRAJECTORIES / one.label / task for task in one.experts}
    return found if all(folder.is_dir() for folder in found.values()) else {}
