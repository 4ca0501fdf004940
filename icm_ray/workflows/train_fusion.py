"""`jobs.train_fusion`: from adapters and trajectories to a trained Fusion-VAE."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.base_model.loading import load_reader
from icm_ray.config import EngineSpec, FusionSpec, TrainFusionRecipe
from icm_ray.distributed.cluster import worker_count
from icm_ray.distributed.evidence import checkpoints_on_ray
from icm_ray.distributed.fusion_trainer import check_resources, train_fusion_on_ray
from icm_ray.distributed.fusion_worker import FusionOrder
from icm_ray.distributed.session import Session, opened
from icm_ray.errors import InputError, RecipeError
from icm_ray.files import (
    MANIFEST,
    is_done,
    read_manifest,
    refuse_foreign,
    sha256_of,
    sha256_of_file,
)
from icm_ray.fusion.material import content_of, trajectories_in
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.serial import Checkpoints, check_joins, join, objectives_of, runs_base
from icm_ray.fusion.store import load_fusion, save_fusion
from icm_ray.fusion.train import finished
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.tasks import LearnerData, experts_for, learner_data
from icm_ray.linalg.threads import kernel_threads
from icm_ray.merging.estimate import warn, warnings_of
from icm_ray.report.fusion_page import write_fusion_page
from icm_ray.types import Adapter
from icm_ray.workflows.prepared import data_of, heads_in, prepared_base, preparing

VERSION = 3
KEPT = ("reconstruction_error", "kl_total", "against_soup", "bytes", "optimizer_bytes")
"""Of a model's report: what `results.json` repeats."""


@dataclass(frozen=True)
class Training:
    """A recipe whose adapters and data were read.

    Attributes:
        recipe: The recipe.
        files: The adapters.
        data: Inputs of each task, with heads and labels where the inner loss reads them.
    """

    recipe: TrainFusionRecipe
    files: Sequence[AdapterFile]
    data: LearnerData

    @cached_property
    def trajectories(self) -> dict[str, Path]:
        """Folders of checkpoints by task, if the recipe names some."""
        return trajectories_in(self.recipe.trajectories, self.files)

    def key(self, session: Session) -> str:
        """Return what identifies a model; of the number of workers only its last digits depend."""
        recipe = self.recipe
        fusion = FusionSpec() if recipe.joins else recipe.fusion  # nothing is trained
        content = {
            **content_of(fusion, self.files, self.trajectories, self.data),
            "version": VERSION,
            "base": session.key,
        }
        if recipe.joins:
            return sha256_of({**content, "joins": sha256_of_file(Path(recipe.joins) / MANIFEST)})
        engine = recipe.engine.model_dump(include={"zero_stage", "accumulation", "precision"})
        content |= {"engine": engine, "input_batch": recipe.input_batch}
        return sha256_of({**content, "seed": session.seed, "threads": session.resources.threads})


def run(recipe: TrainFusionRecipe, target: Path) -> dict[str, Any]:
    """Train on the cluster and write the FusionModel that `method: icm_fusion` reads.

    With `joins`, a trained one takes in the adapters instead.
    """
    refuse_foreign(target)
    if recipe.joins and Path(recipe.joins).resolve() == target.resolve():
        raise RecipeError("output: the folder of joins. Choose another one.")
    training, base = asked_of(recipe)
    warn(warnings_of(training.files))
    with opened(recipe.resources, base, recipe.seed, preparing(recipe)) as session:
        key = training.key(session)
        if not is_done(target, key):
            _make(session, training, target, key)
    return _report(target)


def asked_of(recipe: TrainFusionRecipe) -> tuple[Training, Path]:
    """Open what a recipe names; return it and the base's folder.

    Raises:
        RecipeError: the recipe asks for nothing, or for what cannot be.
        InputError: adapters, data, base or the Fusion-VAE that they join are not as they should be.
    """
    if not recipe.joins:
        _check(recipe)
    refs = [ref.pair for ref in recipe.adapters]
    files = open_all(refs, recipe.modules_to_save, base=recipe.base, run_by="jobs.train_fusion")
    names = [file.name for file in files]
    if recipe.joins:
        check_joins(load_fusion(Path(recipe.joins)), names)
    training = Training(recipe, files, _data(recipe, names))
    suite, heads = data_of(recipe.data), heads_in(training.data)
    return training, prepared_base(recipe, suite, heads, [recipe.data.split])


def _check(recipe: TrainFusionRecipe) -> None:
    check_resources(recipe.resources)
    problems = []
    if len(recipe.adapters) < 2:
        problems.append(
            "adapters: one but two or more are expected, or joins, a Fusion-VAE that takes it in."
        )
    if not recipe.fusion.steps:
        problems.append("fusion: no step. Set vae_steps or meta_steps.")
    if problems:
        raise RecipeError(problems)


def _data(recipe: TrainFusionRecipe, tasks: Sequence[str]) -> LearnerData:
    """Return the tasks' inputs, with what the inner loss reads; joining runs no inner loss."""
    objectives = [] if recipe.joins else objectives_of(recipe.fusion)
    experts = {}
    for objective in objectives:
        refs = [ref.pair for ref in recipe.adapters]
        experts = experts_for(objective, recipe.heads, recipe.data, refs)
    return learner_data(recipe.data, tasks, objectives, experts)


def _make(session: Session, training: Training, target: Path, key: str) -> None:
    """Join or train, and write the model."""
    files, joins = training.files, training.recipe.joins
    base = session.shared.fingerprint
    if joins and read_manifest(Path(joins)).get("base", base) != base:
        raise InputError(f"base: not the one {joins} was trained with. Name that one.")
    with session.pool(len(files)) as pool:
        known = checkpoints_on_ray(pool, files, training.data.inputs, training.trajectories)
    origin = {"key": key, "base": base}
    if joins:
        model = join(load_fusion(Path(joins)), [file.load() for file in files], known)
        save_fusion(model, target, origin)
    else:
        _train(session, training, known, target, origin)


def _train(
    session: Session, training: Training, known: Checkpoints, target: Path, origin: dict[str, str]
) -> None:
    recipe, adapters = training.recipe, [file.load() for file in training.files]
    tasks = []
    if runs_base(recipe.fusion):
        tasks = training.data.batched(adapters, load_reader(session.base), recipe.input_batch)
    material = FusionMaterial(recipe.fusion, recipe.engine, adapters, known, tasks)
    train_with_engine(session, material, target, origin)


@dataclass(frozen=True)
class FusionMaterial:
    """What DeepSpeed trains a Fusion-VAE with.

    Attributes:
        spec: Representation, network, losses and stages.
        engine: DeepSpeed's part.
        adapters: The finished adapter of every task.
        known: Their checkpoints and task vectors.
        tasks: Inputs of every task; empty if no step runs the base.
    """

    spec: FusionSpec
    engine: EngineSpec
    adapters: Sequence[Adapter]
    known: Checkpoints
    tasks: Sequence[TaskInputs]


def train_with_engine(
    session: Session, material: FusionMaterial, target: Path, origin: dict[str, str]
) -> None:
    """Train by Ray Train and DeepSpeed, and write the model; resumable by `origin["key"]`."""
    spec, adapters = material.spec, material.adapters
    with kernel_threads(session.resources.threads):  # or bits depend on the driver's threads
        layout, table = material.known.encoded(spec.representation, adapters)
    shared = session.shared if runs_base(spec) else None
    resources, seed = session.resources, session.seed
    order = FusionOrder(spec, material.engine, layout, material.tasks, shared, resources, seed)
    world = worker_count(session.resources, len(adapters))
    stem = f".{target.name}.training-{origin['key'][:12]}-"
    scratch = _scratch(target, stem, world)
    try:
        trained = train_fusion_on_ray(order, table, scratch, world)
    except RecipeError:  # of other settings there is nothing to resume
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    meta = MetaTraining(trained.vae, spec, layout, table, None, session.seed)
    model = finished(meta, trained.history, adapters)
    report = {**model.report, "optimizer_bytes": trained.optimizer_bytes}
    save_fusion(replace(model, report=report), target, origin)
    for folder in target.parent.glob(f"{stem}*"):
        shutil.rmtree(folder)


def _scratch(target: Path, stem: str, world: int) -> Path:
    """Return the folder a training resumes from: DeepSpeed's shards fit one number of workers."""
    own = target.with_name(f"{stem}{world}")
    others = [p.name.rpartition("-")[2] for p in target.parent.glob(f"{stem}*")]
    if others and not own.exists():
        warn(
            [
                f"fusion: a training on {', '.join(sorted(others))} workers was interrupted, and "
                f"one on {world} starts anew. Set resources.workers to go on with it."
            ]
        )
    return own


def _report(target: Path) -> dict[str, Any]:
    """Say what the model loses, write its page, and return what `results.json` repeats."""
    report = load_fusion(target).report
    warn(report["warnings"])
    errors = report["reconstruction_error"]
    print("relative error: " + ", ".join(f"{t} {e:.4f}" for t, e in errors.items()))
    print(f"KL {report['kl_total']:.2f} nats; {report['parameters']:,} parameters")
    page = target.with_name(f"{target.name}.report")
    write_fusion_page(report, page)
    outputs = {"evidence": str(target), "report": str(page / "index.html")}
    last = {name: values[-1] for name, values in report["history"].items()}
    kept = {name: report[name] for name in KEPT if name in report}
    return {"outputs": outputs, "last": last, **kept}
