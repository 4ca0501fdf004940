"""Rows of method icm_fusion: a Fusion-VAE a set and recipe, and what is adapted from it in context.

Rows with the same recipe share a Fusion-VAE. It is trained on every task of the set, from the
checkpoints that fine-tuning left or else from the adapters alone; a row's `tasks` are then fused
without training again.

fusion/<set>/<recipe's hash>/   the Fusion-VAE
learned/<set>/<row>/            what a row with `in_context` adapted from it
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from icm_ray.adapters import AdapterFile
from icm_ray.config import FusionSpec, LearnSpec, MethodRow, PipelineRecipe
from icm_ray.distributed.cluster import MAX_RETRIES, request, run_bounded, worker_count
from icm_ray.distributed.evidence import Inputs, inputs_key, load_inputs
from icm_ray.distributed.learn import Readable, heads_key, task_inputs
from icm_ray.distributed.learning import LearnOrder, learn_on_ray
from icm_ray.distributed.rows import SetResults, inputs_spec
from icm_ray.distributed.shared_base import SharedBase, rebuild
from icm_ray.evaluation.experts import TRAJECTORIES
from icm_ray.files import RUN_FILE, is_done, read_json, sha256_of, sha256_of_file, write_json
from icm_ray.fusion.data import samples_of
from icm_ray.fusion.latent import DIRECT, IN_CONTEXT, direct_plan, latent_plan, parts_of
from icm_ray.fusion.serial import (
    FUSES,
    HEAD_LOSSES,
    Checkpoints,
    fusion_spec_of,
    reads_heads,
    runs_base,
    train_fusion,
)
from icm_ray.fusion.store import load_fusion, save_fusion
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run
from icm_ray.learning.recipes import Plan, changed_spec, covered_by
from icm_ray.learning.store import LearnedMerge, save_learned
from icm_ray.linalg.threads import kernel_threads
from icm_ray.methods.merge import find_method
from icm_ray.planning import warn
from icm_ray.suites import Suite

VERSION = 1
INPUT_BATCH = 16
"""Inputs of one inner step, and of one step in context."""


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
    rows = fusion_rows(recipe)
    if not rows:
        return list(sets)
    trained = _train_all(recipe, suite, sets, vectors, base, shared, root)
    found = []
    for one in sets:
        folders = {}
        for row in rows:
            model = trained[one.label, _name(row)]
            folders[row.name] = (
                _adapted(recipe, suite, one, row, model, base, shared, root)
                if row.in_context
                else model
            )
        found.append(replace(one, fused=folders))
    return found


def context_specs(row: MethodRow) -> tuple[LearnSpec, LearnSpec | None]:
    """Return how a row's latent moves, and then its cores; `learn` changes the first.

    Raises:
        RecipeError: `learn` names what does not exist.
    """
    latent = changed_spec(IN_CONTEXT, row.learn)
    if row.in_context != "direct":
        return latent, None
    return latent, DIRECT.model_copy(update={"objective": latent.objective})


def cost_of(folder: Path) -> float:
    """Return the processor time that what a folder holds has taken, in seconds."""
    run = folder / RUN_FILE
    return float(read_json(run).get("cpu_seconds", 0.0)) if run.is_file() else 0.0


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
    seed: int
    key: str
    label: str


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
    for one in sets:
        inputs = load_inputs(inputs_spec(recipe), list(one.experts))
        for name, spec in specs.items():
            folder = folders[one.label, name] = root / "fusion" / one.label / name
            trajectories = _trajectories(one, root)
            label = f"{one.label} {name}"
            order = _Order(
                spec, one.files(), trajectories, vectors[one.label], (), recipe.seed, "", label
            )
            readable = _readable(spec, suite, one, recipe)
            order = replace(order, key=_key(order, inputs, readable, shared, recipe))
            if not is_done(folder, order.key):
                if not trajectories:
                    warn([f"fusion {one.label}: no trajectories, so from the adapters alone."])
                if runs_base(spec):
                    made = task_inputs(order.files, inputs, readable, base, INPUT_BATCH)
                    order = replace(order, tasks=made)
                calls[one.label, name] = _call(shared, recipe, order, folder)
    slots = [None] * worker_count(recipe.resources, max(len(calls), 1))
    run_bounded(slots, calls, timeout=recipe.resources.timeout_seconds)
    return folders


def _call(shared: SharedBase, recipe: PipelineRecipe, order: _Order, folder: Path) -> Any:
    options = request(recipe.resources)
    return lambda _slot: _train.options(**options).remote(shared, recipe, order, folder)


@ray.remote(max_retries=MAX_RETRIES)
def _train(shared: SharedBase, recipe: PipelineRecipe, order: _Order, folder: Path) -> None:
    from ray.experimental import tqdm_ray

    started = time.process_time()
    adapters = [file.load() for file in order.files]
    samples = [s for a in adapters for s in samples_of(a, order.trajectories.get(a.name))]
    bar = tqdm_ray.tqdm(total=order.spec.steps, desc=f"fusion {order.label}", flush_interval_s=3.0)
    with kernel_threads(recipe.resources.threads):
        base = rebuild(shared, recipe.resources).model if runs_base(order.spec) else None
        model = train_fusion(
            order.spec,
            adapters,
            Checkpoints(samples, order.vectors),
            base=base,
            tasks=order.tasks,
            seed=order.seed,
            threads=recipe.resources.threads,
            progress=lambda _step, _loss: bar.update(1),
        )
    bar.close()
    save_fusion(model, folder, {"key": order.key})
    write_json(folder / RUN_FILE, {"cpu_seconds": time.process_time() - started})


def _trajectories(one: SetResults, root: Path) -> dict[str, Path]:
    """Return the folders of checkpoints by task; all or none, else tasks would weigh unequally."""
    found = {task: root / TRAJECTORIES / one.label / task for task in one.experts}
    return found if all(folder.is_dir() for folder in found.values()) else {}


def _readable(
    spec: FusionSpec, suite: Suite, one: SetResults, recipe: PipelineRecipe
) -> dict[str, Readable]:
    if not reads_heads(spec):
        return {}
    limit, found = recipe.sizes.calibration, {}
    for task, expert in one.experts.items():
        labels = None
        if HEAD_LOSSES[spec.inner.loss] == "supervised":
            labels = suite.load(task, "calibration", limit).targets.tolist()
        found[task] = Readable(suite.tasks[task], expert.head(), labels)
    return found


def _key(
    order: _Order,
    inputs: Inputs,
    readable: Mapping[str, Readable],
    shared: SharedBase,
    recipe: PipelineRecipe,
) -> str:
    paths = sorted(path for f in order.trajectories.values() for path in f.glob("*.parquet"))
    return sha256_of(
        {
            "version": VERSION,
            "spec": order.spec.model_dump(),
            "adapters": {file.name: file.fingerprint() for file in order.files},
            "trajectories": [sha256_of_file(path) for path in paths],
            "inputs": {task: inputs_key(*told) for task, told in inputs.items()},
            "heads": heads_key(readable),
            "base": shared.fingerprint,
            "seed": recipe.seed,
            "threads": recipe.resources.threads,
        }
    )


def _adapted(
    recipe: PipelineRecipe,
    suite: Suite,
    one: SetResults,
    row: MethodRow,
    model_folder: Path,
    base: Path,
    shared: SharedBase,
    root: Path,
) -> Path:
    """Return the folder of a latent, then of cores, adapted on the row's inputs by task actors."""
    folder = root / "learned" / one.label / row.name
    latent, direct = context_specs(row)
    limit = row.inputs or recipe.sizes.calibration
    spec = inputs_spec(recipe).model_copy(update={"inputs_per_task": limit})
    files = one.files(row.tasks)
    inputs = load_inputs(spec, [file.name for file in files])
    heads = {}
    if latent.objective.heads:
        heads = {f.name: Readable(suite.tasks[f.name], one.experts[f.name].head()) for f in files}
    key = sha256_of(
        {
            "version": VERSION,
            "heads": heads_key(heads),
            "model": sha256_of_file(model_folder / "manifest.json"),
            "adapters": {file.name: file.fingerprint() for file in files},
            "inputs": {task: inputs_key(*told) for task, told in inputs.items()},
            "latent": latent.model_dump(),
            "direct": direct.model_dump() if direct else None,
            "base": shared.fingerprint,
            "seed": recipe.seed,
            "threads": recipe.resources.threads,
        }
    )
    if is_done(folder, key):
        return folder
    tasks = task_inputs(files, inputs, heads, base, latent.optimisation.batch)
    adapters = [task.adapter for task in tasks]
    scratch = folder.with_name(f".{folder.name}.learning-{key[:12]}")

    def stage(plan: Plan, name: str) -> tuple[LearnedMerge, float]:
        (scratch / name).mkdir(parents=True, exist_ok=True)
        return learn_on_ray(
            shared,
            LearnOrder(plan, tasks, Run(recipe.seed, threads=recipe.resources.threads)),
            covered_by(plan.spec.objective, tasks),
            recipe.resources,
            origin={"method": row.method, name: plan.spec.model_dump()},
            scratch=scratch / name,
            key=key,
            label=f"{row.name} {name} {one.label}",
        )

    plan = latent_plan(load_fusion(model_folder), adapters, latent)
    learned, seconds = stage(plan, "latent")
    if direct is not None:
        then = direct_plan(adapters, parts_of(learned.tensors), direct)
        learned, more = stage(then, "direct")
        seconds += more
    save_learned(learned, folder, {"key": key})
    write_json(folder / RUN_FILE, {"cpu_seconds": seconds + cost_of(model_folder)})
    for path in sorted(scratch.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    scratch.rmdir()
    return folder
