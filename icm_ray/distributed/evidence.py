"""Evidence in parallel: each actor holds one adapter and runs its own unlabelled inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import ray

from icm_ray.adapters import AdapterFile
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.session import Pool
from icm_ray.evidence.gather import AdapterEvidence
from icm_ray.evidence.tensors import write_evidence
from icm_ray.files import is_done, sha256_of
from icm_ray.fusion.serial import Checkpoints
from icm_ray.learning.tasks import Inputs, inputs_key

EVIDENCE_BATCH = 32
"""Examples a forward, unless a recipe says otherwise."""


def gather_on_ray(
    pool: Pool, files: Sequence[AdapterFile], inputs: Inputs, batch: int = EVIDENCE_BATCH
) -> list[AdapterEvidence]:
    """Return task vector and null-space ratios of every adapter, in the order of their names.

    Args:
        pool: Actors that hold the base.
        files: The adapters.
        inputs: Unlabelled inputs of each task.
        batch: Examples a forward.
    """
    in_order = sorted(files, key=lambda file: file.name)
    arguments = {f.name: (AdapterSource(f), *inputs[f.name], batch) for f in in_order}
    return list(pool.map("evidence", arguments, label="task vectors").values())


def grams_on_ray(
    pool: Pool,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    folder: Path,
    batch: int = EVIDENCE_BATCH,
    modules: Sequence[str] | None = None,
) -> Path:
    """Gather every adapter's Gram statistics, or find them in `folder`; return the folder.

    They serve any subset of these adapters: each task's own stay apart.

    Args:
        pool: Actors that hold the base.
        files: The adapters.
        inputs: Unlabelled inputs of each task.
        folder: Where the statistics go.
        batch: Examples a forward.
        modules: Of these layers; by default, of all that the adapters change.
    """
    modules = modules or sorted({module for file in files for module in file.shapes})
    base = pool.session.key
    key = sha256_of(["grams", modules, evidence_key(base, files, inputs, batch)])
    if is_done(folder, key):
        return folder
    shared = ray.put(modules)
    arguments = {f.name: (AdapterSource(f), shared, *inputs[f.name], batch) for f in files}
    grams = pool.map("grams", arguments, label="Gram statistics")
    write_evidence(
        folder,
        "gram_statistics",
        {f"{m}.gram.{t}": gram for t, one in grams.items() for m, gram in one.grams.items()},
        adapters={task: one.fingerprint for task, one in grams.items()},
        shared={task: one.shared for task, one in grams.items()},
        described={
            "inputs": {t: g.inputs for t, g in grams.items()},
            "rows": {t: dict(g.rows) for t, g in grams.items()},
        },
        origin={"key": key, "base": base},
    )
    return folder


def evidence_key(base: str, files: Sequence[AdapterFile], inputs: Inputs, batch: int) -> str:
    """Return what identifies a piece of evidence: base, adapters, inputs and batch size."""
    return sha256_of(
        {
            "base": base,
            "adapters": {file.name: file.fingerprint for file in files},
            "inputs": {task: inputs_key(*own) for task, own in inputs.items()},
            "batch": batch,
        }
    )


def checkpoints_on_ray(
    pool: Pool, files: Sequence[AdapterFile], inputs: Inputs, trajectories: Mapping[str, Path]
) -> Checkpoints:
    """Return what a Fusion-VAE is trained on, task vectors gathered on the adapter actors.

    Args:
        pool: Actors that hold the base.
        files: The adapters.
        inputs: Unlabelled inputs of each task.
        trajectories: By task: the folder of its checkpoints; empty for the adapters alone.
    """
    vectors = {one.task: one.task_vector for one in gather_on_ray(pool, files, inputs)}
    return Checkpoints.read([file.load() for file in files], trajectories, vectors)
