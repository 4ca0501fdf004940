"""Train experts in parallel: one Ray task an expert, each resumable."""

import shutil
from pathlib import Path
from typing import Any

import ray
import torch

from icm_ray.config import FinetuneRecipe
from icm_ray.distributed.cluster import MAX_RETRIES, request, run_bounded, worker_count
from icm_ray.distributed.probes import fit_probes, read_probe
from icm_ray.distributed.shared_base import SharedBase, rebuild
from icm_ray.evaluation.experts import ADAPTER, HEAD, METRICS, TRAJECTORIES
from icm_ray.evaluation.heads import Head
from icm_ray.files import is_done, sha256_of, whole_folder, write_json
from icm_ray.finetuning.expert import (
    ExpertJob,
    losses_summary,
    save_adapter_of,
    train_expert,
)
from icm_ray.finetuning.trajectory import FOLDER
from icm_ray.linalg.threads import kernel_threads
from icm_ray.suites import SUITES, Examples, Suite

VERSION = 1
"""Raise it when training or one of its defaults changes: older experts are not today's."""


def expert_key(job: ExpertJob, base: str, data: str, validation: int, dtype: str) -> str:
    """Return what identifies an expert's bytes: base, data and every hyper-parameter."""
    return sha256_of(
        {
            "version": VERSION,
            "base": base,
            "data": data,
            "task": job.task.name,
            # Without defaults, so that a new setting does not disown the experts there are.
            "lora": job.lora.model_dump(exclude_defaults=True),
            "training": job.training.model_dump(exclude_defaults=True, exclude={"save_every"}),
            "set": job.which.label,
            "validation": validation,  # chose the probe the expert starts from
            "dtype": dtype,
        }
    )


def expert_jobs(recipe: FinetuneRecipe, suite: Suite) -> dict[tuple[str, str], ExpertJob]:
    """Return every expert of the recipe by (set label, task)."""
    tasks = recipe.tasks or list(suite.tasks)
    return {
        (which.label, task): ExpertJob(suite.tasks[task], recipe.lora, recipe.training, which)
        for which in recipe.sets
        for task in tasks
    }


def finetune(
    recipe: FinetuneRecipe,
    shared: SharedBase,
    base_name: str,
    root: Path,
    ready: str | None = None,
) -> dict[tuple[str, str], Path]:
    """Train every expert that is not there yet; return the folders by (set label, task).

    Args:
        recipe: Suite, sets and hyper-parameters.
        shared: The base in the object store.
        base_name: What the adapters' configs name as their base.
        root: Experts go to `<root>/experts/<set>/<task>/`, each whole or not at all, and their
            checkpoints to `<root>/trajectories/<set>/<task>/`.
        ready: Folder of the same layout whose experts are used where they are exactly these.
    """
    suite = SUITES[recipe.suite]
    jobs = expert_jobs(recipe, suite)
    folders = {key: root / "experts" / key[0] / key[1] for key in jobs}
    keys = {
        key: expert_key(
            job,
            shared.fingerprint,
            suite.fingerprint(job.task.name),
            recipe.sizes.validation,
            recipe.dtype,
        )
        for key, job in jobs.items()
    }
    for key in jobs if ready else ():
        committed = Path(str(ready)) / key[0] / key[1]
        if is_done(committed, keys[key]):
            folders[key] = committed
    missing = [key for key in jobs if not is_done(folders[key], keys[key])]
    data = {t: suite.load(t, "train", recipe.training.train_examples) for _, t in missing}
    heads = _starting_heads(recipe, suite, shared, root) if missing else {}
    options = request(recipe.resources)

    def call(key: tuple[str, str]) -> Any:
        return lambda _slot: _train.options(**options).remote(
            shared,
            jobs[key],
            data[key[1]],
            heads.get(key[1]),
            recipe,
            base_name,
            folders[key],
            keys[key],
        )

    slots = [None] * worker_count(recipe.resources, max(len(missing), 1))
    run_bounded(
        slots,
        {key: call(key) for key in missing},
        timeout=recipe.resources.timeout_seconds,
    )
    return folders


def _starting_heads(
    recipe: FinetuneRecipe, suite: Suite, shared: SharedBase, root: Path
) -> dict[str, Head]:
    tasks = [task for task in recipe.tasks or suite.tasks if suite.tasks[task].headed]
    folders = fit_probes(
        suite, tasks, recipe.training, recipe.sizes, shared, recipe.resources, root
    )
    return {task: read_probe(folder)[0] for task, folder in folders.items()}


@ray.remote(max_retries=MAX_RETRIES)
def _train(
    shared: SharedBase,
    job: ExpertJob,
    train: Examples,
    start: Head | None,
    recipe: FinetuneRecipe,
    base_name: str,
    folder: Path,
    key: str,
) -> None:
    from ray.experimental import tqdm_ray

    scratch = folder.with_name(f".{folder.name}.training-{key[:12]}")
    scratch.mkdir(parents=True, exist_ok=True)
    name = f"finetune {job.which.label} {job.task.name}"
    bar = tqdm_ray.tqdm(total=job.training.steps, desc=name, flush_interval_s=3.0)
    with kernel_threads(recipe.resources.threads):
        base = rebuild(shared, recipe.resources)
        trained = train_expert(
            base, job, train, start, scratch, lambda step, _loss: bar.update(step - bar._x)
        )
    bar.close()
    info = {
        "key": key,
        "task": job.task.name,
        "set": job.which.model_dump(),
        "lora": job.lora.model_dump(),
        "training": job.training.model_dump(),
        "base": shared.fingerprint,
        "data": SUITES[recipe.suite].fingerprint(job.task.name),
    }
    # Apart from the expert, because it is twenty times as large and only some methods train on it.
    trajectory = folder.parents[2] / TRAJECTORIES / folder.parent.name / folder.name
    with whole_folder(trajectory, info=info) as target:
        shutil.copytree(scratch / FOLDER, target, dirs_exist_ok=True)
    with whole_folder(folder, info=info) as target:
        save_adapter_of(trained.model, target / ADAPTER, getattr(torch, recipe.dtype), base_name)
        if trained.head is not None:
            trained.head.save(target / HEAD)
        write_json(target / METRICS, {"losses": trained.losses, **losses_summary(trained.losses)})
    shutil.rmtree(scratch)
