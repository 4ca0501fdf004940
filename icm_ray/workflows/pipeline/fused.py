"""Rows of method icm_fusion: a Fusion-VAE a set and recipe, and what is adapted from it in context.

Rows with the same recipe share a Fusion-VAE. It is trained on every task of the set, from the
checkpoints that fine-tuning left or else from the adapters alone; a row's `tasks` are then fused
without training again.

fusion/<set>/<recipe's hash>/   the Fusion-VAE
learned/<set>/<row>/            what a row with `in_context` adapted from it
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from icm_ray.base_model.loading import load_reader
from icm_ray.config import INPUT_BATCH, EngineSpec, FusionSpec, MethodRow
from icm_ray.distributed.cluster import worker_count
from icm_ray.distributed.fusion_tasks import FusionTask, train_fusions
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import TRAJECTORIES
from icm_ray.evidence.store import load_evidence
from icm_ray.files import RUN_FILE, is_done, sha256_of, write_json
from icm_ray.fusion.in_context import Context, context_specs
from icm_ray.fusion.latent import check_beneath
from icm_ray.fusion.material import content_of
from icm_ray.fusion.serial import Checkpoints, fusion_spec_of, objectives_of, runs_base
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.tasks import LearnerData, learner_data
from icm_ray.merging.estimate import warn
from icm_ray.methods import find_method
from icm_ray.workflows.pipeline.learned import learn_row
from icm_ray.workflows.pipeline.offer import affords
from icm_ray.workflows.pipeline.table import SetResults, Table
from icm_ray.workflows.train_fusion import FusionMaterial, train_with_engine

VERSION = 3


def fuse_rows(table: Table) -> None:
    """Make what each fusion row merges with: its Fusion-VAE, and what it adapts from it."""
    rows = [row for row in table.rows_that_need("fusion_model") if affords(table, row)]
    trained = _train_all(table)
    for one in table.sets:
        for row in rows:
            folder = trained[one.label, _name(row)]
            if row.in_context:
                latent, direct = context_specs(row.in_context, row.learn)
                folder = learn_row(table, one, row, latent, Context(folder, direct))
            one.fused[row.name] = folder


def check_fusion_row(row: MethodRow) -> None:
    """Raise RecipeError if a row's `fusion` or `in_context` is wrong, or would do nothing."""
    if find_method(row.method).needs != "fusion_model":
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


def _train_all(table: Table) -> dict[tuple[str, str], Path]:
    """Return the Fusion-VAEs by set and recipe, trained at the same time where there is room."""
    rows = table.rows_that_need("fusion_model")
    specs = {_name(row): fusion_spec_of(row.fusion) for row in rows}
    folders: dict[tuple[str, str], Path] = {}
    missing: dict[Path, FusionTask] = {}
    for one in table.sets:
        for name, spec in specs.items():
            folder = folders[one.label, name] = table.root / "fusion" / one.label / name
            data = learner_data(table.inputs(), list(one.experts), objectives_of(spec), one.experts)
            training = _training(table, one, spec, data)
            if not is_done(folder, training.key):
                missing[folder] = replace(training, tasks=_tasks(table, training, data))
                if not training.trajectories:
                    warn([f"fusion {one.label}: no trajectories, so from the adapters alone."])
    engine = table.engine
    if engine is None:
        train_fusions(table.session, missing)
    for folder, training in missing.items() if engine else ():
        assert engine is not None
        _train_with(engine, table, training, folder)
    return folders


def _train_with(engine: EngineSpec, table: Table, training: FusionTask, folder: Path) -> None:
    """Train one Fusion-VAE by Ray Train and DeepSpeed, over as many workers as there are."""
    started, adapters = time.monotonic(), [file.load() for file in training.files]
    known = Checkpoints.read(adapters, training.trajectories, training.vectors)
    material = FusionMaterial(training.spec, engine, adapters, known, training.tasks)
    train_with_engine(table.session, material, folder, {"key": training.key})
    workers = worker_count(table.session.resources, len(adapters))
    write_json(folder / RUN_FILE, {"cpu_seconds": (time.monotonic() - started) * workers})


def _training(table: Table, one: SetResults, spec: FusionSpec, data: LearnerData) -> FusionTask:
    """Return a set's training, its inputs not read yet."""
    session, files, trajectories = table.session, one.proven(), _trajectories(table, one)
    content = {
        **content_of(spec, files, trajectories, data),
        "version": VERSION,
        "base": session.key,
        "seed": session.seed,
        "threads": session.resources.threads,
        **({"engine": table.engine.model_dump()} if table.engine else {}),
    }
    assert one.evidence is not None, "gathered before"
    vectors = load_evidence(one.evidence)[0].vectors
    return FusionTask(spec, files, trajectories, vectors, (), sha256_of(content), one.label)


def _tasks(table: Table, training: FusionTask, data: LearnerData) -> Sequence[TaskInputs]:
    """Return every task's inputs, if a step runs the base."""
    if not runs_base(training.spec):
        return ()
    adapters = [file.load() for file in training.files]
    return data.batched(adapters, load_reader(table.session.base), INPUT_BATCH)


def _trajectories(table: Table, one: SetResults) -> Mapping[str, Path]:
    """Return the folders of checkpoints by task; all or none, else tasks would weigh unequally."""
    place = table.root / TRAJECTORIES / one.label
    folders = {task: place / task for task in one.experts}
    return folders if all(folder.is_dir() for folder in folders.values()) else {}
