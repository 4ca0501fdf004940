"""Evidence in parallel: each actor holds one adapter and runs its own unlabelled inputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.cluster import run_bounded
from icm_ray.evidence.gather import AdapterEvidence
from icm_ray.evidence.tensors import write_given
from icm_ray.files import is_done, sha256_of
from icm_ray.fusion.material import Trajectories
from icm_ray.fusion.serial import Checkpoints
from icm_ray.learning.tasks import EVIDENCE_BATCH, Inputs, inputs_key
from icm_ray.types import SavedModulesPolicy


def gather_on_ray(
    actors: Sequence[Any],
    sources: Sequence[AdapterSource],
    inputs: Inputs,
    *,
    batch: int,
    timeout: float,
) -> list[AdapterEvidence]:
    """Return task vector and null-space ratios of every adapter, in the order of their names."""

    def call(source: AdapterSource) -> Any:
        texts, max_tokens = inputs[source.name]
        return lambda actor: actor.evidence.remote(source, texts, max_tokens, batch)

    in_order = sorted(sources, key=lambda source: source.name)
    calls = {source.name: call(source) for source in in_order}
    return list(run_bounded(actors, calls, timeout=timeout).values())


def grams_on_ray(
    actors: Sequence[Any],
    sources: Sequence[AdapterSource],
    modules: Sequence[str],
    inputs: Inputs,
    folder: Path,
    *,
    base: str,
    batch: int,
    timeout: float,
) -> Path:
    """Gather every adapter's Gram statistics, or find them in `folder`; return the folder.

    They serve any subset of these adapters: each task's own stay apart.

    Args:
        actors: Pool that holds the base.
        sources: The adapters.
        modules: Every module of any of them.
        inputs: Unlabelled inputs of each task.
        folder: Where the statistics go.
        base: Fingerprint of the base.
        batch: Examples a forward.
        timeout: Longest wait for one task, seconds.
    """
    from ray.experimental import tqdm_ray

    key = sha256_of(["grams", list(modules), evidence_key(base, sources, inputs, batch)])
    if is_done(folder, key):
        return folder
    bar = tqdm_ray.tqdm(total=len(sources), desc="Gram statistics")

    def call(source: AdapterSource) -> Any:
        texts, max_tokens = inputs[source.name]
        return lambda actor: actor.grams.remote(source, modules, texts, max_tokens, batch)

    calls = {source.name: call(source) for source in sources}
    found = run_bounded(actors, calls, timeout=timeout, done=lambda _task, _grams: bar.update(1))
    bar.close()
    write_given(
        folder,
        "gram_statistics",
        {f"{m}.gram.{t}": gram for t, one in found.items() for m, gram in one.grams.items()},
        adapters={task: one.fingerprint for task, one in found.items()},
        shared={task: one.shared for task, one in found.items()},
        described={
            "inputs": {t: g.inputs for t, g in found.items()},
            "rows": {t: dict(g.rows) for t, g in found.items()},
        },
        origin={"key": key, "base": base},
    )
    return folder


def evidence_key(base: str, sources: Sequence[AdapterSource], inputs: Inputs, batch: int) -> str:
    """Return what identifies a piece of evidence: base, adapters, inputs and batch size."""
    return sha256_of(
        {
            "base": base,
            "adapters": {s.name: s.fingerprint for s in sources},
            "inputs": {task: inputs_key(*told) for task, told in inputs.items()},
            "batch": batch,
        }
    )


def checkpoints_on_ray(
    actors: Sequence[Any],
    files: Sequence[AdapterFile],
    policy: SavedModulesPolicy,
    inputs: Inputs,
    trajectories: Trajectories,
    timeout: float,
) -> Checkpoints:
    """Return what a Fusion-VAE is trained on, task vectors gathered on the adapter actors."""
    gathered = gather_on_ray(
        actors,
        [AdapterSource.of(file, policy) for file in files],
        inputs,
        batch=EVIDENCE_BATCH,
        timeout=timeout,
    )
    vectors = {one.task: one.task_vector for one in gathered}
    return Checkpoints.read([file.load() for file in files], trajectories, vectors)
