"""Evidence in parallel: each actor holds one adapter and runs its own unlabelled inputs."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray

from icm_ray.adapters import AdapterFile
from icm_ray.base_model.states import Pooling
from icm_ray.checkpoint import scratch_folder
from icm_ray.distributed.actors import AdapterSource, MergeSource
from icm_ray.distributed.session import Pool
from icm_ray.evidence.gather import AdapterEvidence
from icm_ray.evidence.gram_files import GramOrder, join_parts, room_lines
from icm_ray.files import is_done, sha256_of
from icm_ray.fusion.serial import Checkpoints
from icm_ray.learning.tasks import Inputs, inputs_key
from icm_ray.merging.estimate import warn
from icm_ray.merging.order import MergeRequest

VERSION = 3
"""Of Gram statistics: raised when the same recipe would give other bytes."""
EVIDENCE_BATCH = 32
"""Examples a forward, unless a recipe says otherwise."""


def gather_on_ray(
    pool: Pool,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    batch: int = EVIDENCE_BATCH,
    position: Pooling = "mean",
) -> list[AdapterEvidence]:
    """Return task vector and null-space ratios of every adapter, in the order of their names.

    Args:
        pool: Actors that hold the base.
        files: The adapters.
        inputs: Unlabelled inputs of each task.
        batch: Examples a forward.
        position: Whose state a task vector is of: the mean over tokens, or the last token.
    """
    in_order = sorted(files, key=lambda file: file.name)
    arguments = {f.name: (AdapterSource(f), *inputs[f.name], batch, position) for f in in_order}
    return list(pool.map("evidence", arguments, label="task vectors").values())


def grams_on_ray(
    pool: Pool,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    folder: Path,
    batch: int = EVIDENCE_BATCH,
    modules: Sequence[str] | None = None,
    merge: MergeSource | None = None,
) -> Path:
    """Gather every adapter's Gram statistics, or find them in `folder`; return the folder.

    They serve any subset of these adapters: each task's own stay apart. Workers write them beside
    the folder, which they all see; a killed run goes on from what they wrote.

    Args:
        pool: Actors that hold the base.
        files: The adapters.
        inputs: Unlabelled inputs of each task.
        folder: Where the statistics go.
        batch: Examples a forward.
        modules: Of these layers; by default, of all that the adapters change.
        merge: What the base carries while it reads; by default, each input its own adapter.
    """
    widths = input_widths(files)
    modules = modules or sorted(widths)
    base, directions = pool.session.key, pool.session.resources.gram_directions
    content = [VERSION, modules, directions, evidence_key(base, files, inputs, batch)]
    content += [merge.fingerprint] if merge else []
    key = sha256_of(["grams", *content])
    if is_done(folder, key):
        return folder
    warn(room_lines(folder, list(widths.values()), len(files), directions))
    order = GramOrder(modules, directions, scratch_folder(folder, "gathering", key), key)
    shared = ray.put(order)
    arguments = {f.name: (AdapterSource(f), shared, *inputs[f.name], batch, merge) for f in files}
    pool.map("grams", arguments, label="Gram statistics")
    join_parts(order, arguments, folder, {"key": key, "base": base})
    shutil.rmtree(order.scratch)
    return folder


def grams_again_on_ray(
    pool: Pool,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    folder: Path,
    first: Path,
    batch: int = EVIDENCE_BATCH,
) -> Path:
    """Gather Gram statistics as one merged adapter's layers see the inputs; return the folder.

    RegMean solves each layer for the inputs that the layers below give it when each task has its
    own expert; in the merge they give others. So statistics of the first kind make a merge, and
    those that are gathered through it are what the next one is solved for.

    Paper: arXiv 2508.03121 (RegMean++), which goes from layer to layer. Differs: all layers at
    once, from the first merge; a third round on top of the second was worse than it.

    Args:
        pool: Actors that hold the base.
        files: The adapters.
        inputs: Unlabelled inputs of each task.
        folder: Where the statistics go.
        first: Those of the experts.
        batch: Examples a forward.
    """
    merge = MergeSource.of(files, MergeRequest("regmean", evidence=first))
    return grams_on_ray(pool, files, inputs, folder, batch, merge=merge)


def input_widths(files: Sequence[AdapterFile]) -> dict[str, int]:
    """Return the number of features that each module reads."""
    return {module: shape[1] for file in files for module, shape in file.shapes.items()}


def evidence_key(
    base: str,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    batch: int,
    position: Pooling = "mean",
) -> str:
    """Return what identifies a piece of evidence; see `gather_on_ray`."""
    return sha256_of(
        {
            "base": base,
            "adapters": {file.name: file.fingerprint for file in files},
            "inputs": {task: inputs_key(*own) for task, own in inputs.items()},
            "batch": batch,
            **({} if position == "mean" else {"position": position}),
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
