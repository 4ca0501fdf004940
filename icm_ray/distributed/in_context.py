"""Fusion in context (F3) on the task actors: from a Fusion-VAE and inputs to what `merge` reads."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile
from icm_ray.config import LearnSpec, Resources, changed
from icm_ray.distributed.evidence import Inputs
from icm_ray.distributed.learn import Readable, learned_key, read_grams, run_of, task_inputs
from icm_ray.distributed.learning import LearnOrder, learn_on_ray
from icm_ray.distributed.rows import cost_of
from icm_ray.distributed.shared_base import SharedBase
from icm_ray.errors import RecipeError
from icm_ray.files import MANIFEST, RUN_FILE, is_done, sha256_of, sha256_of_file, write_json
from icm_ray.fusion.latent import DIRECT, IN_CONTEXT, in_stages
from icm_ray.fusion.store import load_fusion
from icm_ray.learning.recipes import Plan, covered_by, needs_grams, plan_of
from icm_ray.learning.store import LearnedMerge, save_learned

SHARED = (
    "reduction",
    "worst",
    "task_weights",
    "batch",
    "tasks_per_forward",
    "save_memory",
    "save_every",
)
"""What both stages take from a recipe; how far and fast each one moves is its own."""


def context_specs(
    depth: str | None, changes: Mapping[str, Any]
) -> tuple[LearnSpec, LearnSpec | None]:
    """Return how a latent moves, and then its cores if `depth` is "direct".

    Args:
        depth: "latent", "direct", or None for neither.
        changes: To how the latent moves; both stages minimise the same.

    Raises:
        RecipeError: `changes` name what does not exist, or what a latent has not.
    """
    acts = {"residual", "residual_scale", "rho"}
    if set(changes.get("start", {})) - acts or "parameters" in changes:
        raise RecipeError(
            f"learn: in_context moves a latent; of start only {', '.join(sorted(acts))} act."
        )
    latent = changed(IN_CONTEXT, changes, "learn")
    if latent.objective.kind != "task_vector_match":
        raise RecipeError(
            f"learn.objective.kind: {latent.objective.kind!r} but in_context knows "
            "task_vector_match."
        )
    if depth != "direct":
        return latent, None
    same = {name: getattr(latent.optimisation, name) for name in SHARED}
    how = DIRECT.optimisation.model_copy(update=same)
    update = {"objective": latent.objective, "optimisation": how}
    return latent, DIRECT.model_copy(update=update)


def adapted_on_ray(
    latent: LearnSpec,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    folder: Path,
    *,
    direct: LearnSpec | None,
    fusion: Path,
    base: Path,
    shared: SharedBase,
    resources: Resources,
    seed: int,
    grams: Callable[[], Path],
    label: str,
) -> Path:
    """Adapt a latent, then cores, or find what was adapted in `folder`; return the folder.

    Args:
        latent: How the latent moves.
        files: Adapters the Fusion-VAE knows.
        inputs: Unlabelled inputs of each task.
        readable: Heads by task, where the objective reads them.
        folder: Where the evidence goes.
        direct: How the cores move afterwards; None: not.
        fusion: Folder of the Fusion-VAE.
        base: Folder of the base, for its tokenizer.
        shared: The base in the object store.
        resources: What each actor gets.
        seed: Keys the order of batches.
        grams: Gathers Gram statistics; called only if RegMean lies beneath.
        label: Shown by the progress bar.
    """
    told, threads = grams() if needs_grams(latent) else None, resources.threads
    run_as = shared.run_as(resources)
    key = sha256_of(
        [
            learned_key(latent, files, inputs, readable, run_as, seed, threads, told),
            direct.model_dump() if direct else None,
            sha256_of_file(fusion / MANIFEST),
        ]
    )
    if is_done(folder, key):
        return folder
    tasks = task_inputs(files, inputs, readable, base, latent.optimisation.batch)
    scratch = folder.with_name(f".{folder.name}.learning-{key[:12]}")
    seconds = [cost_of(fusion)]

    def stage(plan: Plan, name: str) -> LearnedMerge:
        (scratch / name).mkdir(parents=True, exist_ok=True)
        learned, cost = learn_on_ray(
            shared,
            LearnOrder(plan, tasks, run_of(plan.spec, seed, threads)),
            covered_by(plan.spec.objective, tasks),
            resources,
            origin=plan.spec.model_dump(),
            scratch=scratch / name,
            key=key,
            label=f"{label} {name}",
        )
        seconds.append(cost)
        return learned

    adapters = [task.adapter for task in tasks]
    beneath = None
    if latent.start.residual:
        beneath = plan_of(latent, adapters, read_grams(told, files)).terms.residual
    learned = in_stages(stage, load_fusion(fusion), adapters, latent, direct, beneath=beneath)
    counts = {task: len(texts) for task, (texts, _) in inputs.items()}
    save_learned(learned, folder, {"key": key, "inputs": counts})
    write_json(folder / RUN_FILE, {"cpu_seconds": sum(seconds)})
    shutil.rmtree(scratch)
    return folder
