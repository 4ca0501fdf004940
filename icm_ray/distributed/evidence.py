"""Evidence in parallel: each actor holds one adapter and runs its own unlabelled inputs."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icm_ray.config import DataSpec
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.cluster import run_bounded
from icm_ray.errors import RecipeError
from icm_ray.evidence import readers
from icm_ray.evidence.gather import AdapterEvidence
from icm_ray.files import is_done, sha256_of
from icm_ray.methods.given import write_given
from icm_ray.suites import SUITES, load_folder

EVIDENCE_BATCH = 32
MAX_TOKENS = 128
"""Tokens kept of a user's own text."""

Inputs = Mapping[str, tuple[readers.Inputs, int]]
"""By task: unlabelled texts or images, and the number of tokens to keep of each text."""


def load_inputs(data: DataSpec, tasks: Sequence[str]) -> dict[str, tuple[readers.Inputs, int]]:
    """Return each task's unlabelled inputs, from a suite or from a folder of the user's.

    Raises:
        RecipeError: neither or both of suite and path are named.
        InputError: a task has no data or too little.
    """
    if (data.suite is None) == (data.path is None):
        raise RecipeError("data: name either a suite or a path.")
    if data.suite is not None:
        if data.suite not in SUITES:
            raise RecipeError(f"data.suite: {data.suite!r} but one of {', '.join(SUITES)}.")
        suite = SUITES[data.suite]
        limit = data.inputs_per_task
        return {
            t: (suite.load(t, data.split, limit).inputs, suite.tasks[t].max_tokens) for t in tasks
        }
    folder = Path(str(data.path))
    found = {t: load_folder(folder, t).texts for t in tasks}
    return {t: (texts[: data.inputs_per_task], MAX_TOKENS) for t, texts in found.items()}


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


def inputs_key(inputs: readers.Inputs, max_tokens: int) -> str:
    """Return what identifies one task's inputs."""
    if isinstance(inputs, np.ndarray):
        return sha256_of([list(inputs.shape), hashlib.sha256(inputs.tobytes()).hexdigest()])
    return sha256_of([list(inputs), max_tokens])
