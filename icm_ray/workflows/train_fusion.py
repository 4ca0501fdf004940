"""From adapters and trajectories to a trained Fusion-VAE: the driver of `jobs.train_fusion`."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import FusionSpec, LearnSpec, ObjectiveSpec, TrainFusionRecipe
from icm_ray.distributed.actors import adapter_actors
from icm_ray.distributed.cluster import connected, worker_count
from icm_ray.distributed.evidence import checkpoints_on_ray
from icm_ray.distributed.fusion_trainer import check_resources, train_fusion_on_ray
from icm_ray.distributed.fusion_worker import FusionOrder
from icm_ray.distributed.shared_base import SharedBase, share_base
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
from icm_ray.fusion.serial import (
    HEAD_LOSSES,
    Checkpoints,
    check_joins,
    join,
    reads_heads,
    runs_base,
)
from icm_ray.fusion.store import load_fusion, save_fusion
from icm_ray.fusion.train import finished
from icm_ray.learning.tasks import Inputs, Readable, load_inputs, task_inputs
from icm_ray.linalg.threads import kernel_threads
from icm_ray.merging.estimate import warn, warnings_of
from icm_ray.report.fusion_page import write_fusion_page
from icm_ray.suites.bases import prepare_base
from icm_ray.workflows.learn import readable_of

VERSION = 2


def train_fusion_and_write(recipe: TrainFusionRecipe, target: Path) -> dict[str, Any]:
    """Train on the cluster and write the FusionModel that `method: icm_fusion` reads.

    With `joins`, a trained one takes in the adapters instead.
    """
    refuse_foreign(target)
    _check(recipe, target)
    files = open_all([(r.name, Path(r.path)) for r in recipe.adapters], recipe.modules_to_save)
    names = [file.name for file in files]
    joined = load_fusion(Path(recipe.joins)) if recipe.joins else None
    if joined:  # before any spend
        check_joins(joined, names)
    inputs = load_inputs(recipe.data, names)
    warn(warnings_of(files))
    readable = {} if recipe.joins else _readable(recipe, files)
    base = prepare_base(recipe.base, recipe.cache, recipe.revision, progress=print)
    with connected(recipe.resources):
        shared = share_base(base)
        if recipe.joins:
            _check_base(Path(recipe.joins), shared)
        key = _key(recipe, files, inputs, readable, shared)
        if not is_done(target, key):
            known = _known(recipe, files, inputs, shared)
            if joined:
                model = join(joined, [file.load() for file in files], known)
                save_fusion(model, target, {"key": key, "base": shared.fingerprint})
            else:
                _train(recipe, files, inputs, readable, base, shared, known, target, key)
    report = load_fusion(target).report
    warn(report["warnings"])
    errors = report["reconstruction_error"]
    print("relative error: " + ", ".join(f"{t} {e:.4f}" for t, e in errors.items()))
    print(f"KL {report['kl_total']:.2f} nats; {report['parameters']:,} parameters")
    page = target.with_name(f"{target.name}.report")
    write_fusion_page(report, page)
    outputs = {"evidence": str(target), "report": str(page / "index.html")}
    kept = ("reconstruction_error", "kl_total", "against_soup", "bytes", "optimizer_bytes")
    last = {name: values[-1] for name, values in report["history"].items()}
    told = {name: report[name] for name in kept if name in report}
    return {"outputs": outputs, "last": last, **told}


def _check(recipe: TrainFusionRecipe, target: Path) -> None:
    """Raise RecipeError if the recipe asks for nothing, or for what cannot be."""
    if recipe.joins:
        if Path(recipe.joins).resolve() == target.resolve():
            raise RecipeError("output: the folder of joins. Choose another one.")
        return
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


def _check_base(joins: Path, shared: SharedBase) -> None:
    """Raise InputError if a Fusion-VAE was trained with another base."""
    if read_manifest(joins).get("base", shared.fingerprint) != shared.fingerprint:
        raise InputError(f"base: not the one {joins} was trained with. Name that one.")


def _known(
    recipe: TrainFusionRecipe, files: Sequence[AdapterFile], inputs: Inputs, shared: SharedBase
) -> Checkpoints:
    with adapter_actors(shared, recipe.resources, len(files)) as actors:
        return checkpoints_on_ray(
            actors,
            files,
            recipe.modules_to_save,
            inputs,
            trajectories_in(recipe.trajectories, files),
            recipe.resources.timeout_seconds,
        )


def _train(
    recipe: TrainFusionRecipe,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    base: Path,
    shared: SharedBase,
    known: Checkpoints,
    target: Path,
    key: str,
) -> None:
    adapters = [file.load() for file in files]
    with kernel_threads(recipe.resources.threads):  # or a layout's bits depend on the driver's
        layout, table = known.encoded(recipe.fusion.representation, adapters)
    through_base = runs_base(recipe.fusion)
    order = FusionOrder(
        recipe.fusion,
        recipe.engine,
        layout,
        task_inputs(files, inputs, readable, base, recipe.input_batch) if through_base else (),
        shared if through_base else None,
        recipe.resources,
        recipe.seed,
    )
    world = worker_count(recipe.resources, len(files))
    scratch = _scratch(target, key, world)
    try:
        trained = train_fusion_on_ray(order, table, scratch, world)
    except RecipeError:  # of other settings there is nothing to resume
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    meta = MetaTraining(trained.vae, recipe.fusion, layout, table, None, recipe.seed)
    model = finished(meta, trained.history, adapters)
    report = {**model.report, "optimizer_bytes": trained.optimizer_bytes}
    save_fusion(replace(model, report=report), target, {"key": key, "base": shared.fingerprint})
    for folder in target.parent.glob(f"{_stem(target, key)}*"):
        shutil.rmtree(folder)


def _scratch(target: Path, key: str, world: int) -> Path:
    """Return the folder a training resumes from: DeepSpeed's shards fit one number of workers."""
    own = target.with_name(f"{_stem(target, key)}{world}")
    others = [p.name.rpartition("-")[2] for p in target.parent.glob(f"{_stem(target, key)}*")]
    if others and not own.exists():
        warn(
            [
                f"fusion: a training on {', '.join(sorted(others))} workers was interrupted, and "
                f"one on {world} starts anew. Set resources.workers to go on with it."
            ]
        )
    return own


def _stem(target: Path, key: str) -> str:
    return f".{target.name}.training-{key[:12]}-"


def _readable(recipe: TrainFusionRecipe, files: Sequence[AdapterFile]) -> dict[str, Readable]:
    """Return heads and labels, if the inner loss reads them."""
    if not reads_heads(recipe.fusion):
        return {}
    kind: Any = HEAD_LOSSES[recipe.fusion.inner.loss]
    spec = LearnSpec(objective=ObjectiveSpec(kind=kind))
    return readable_of(recipe.heads, recipe.data, spec, list(files))


def _key(
    recipe: TrainFusionRecipe,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    shared: SharedBase,
) -> str:
    """Return what identifies a model; of the number of workers only its last digits depend."""
    trajectories = trajectories_in(recipe.trajectories, files)
    fusion = FusionSpec() if recipe.joins else recipe.fusion  # nothing is trained
    content = {
        **content_of(fusion, files, trajectories, inputs, readable),
        "version": VERSION,
        "base": shared.run_as(recipe.resources),
    }
    if recipe.joins:
        return sha256_of({**content, "joins": sha256_of_file(Path(recipe.joins) / MANIFEST)})
    return sha256_of(
        {
            **content,
            "engine": recipe.engine.model_dump(include={"zero_stage", "accumulation", "precision"}),
            "input_batch": recipe.input_batch,
            "seed": recipe.seed,
            "threads": recipe.resources.threads,
        }
    )
