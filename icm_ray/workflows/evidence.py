"""`jobs.evidence`: what methods and reports must know of adapters and inputs."""

from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import EvidenceRecipe, LearnRecipe, MergeRecipe
from icm_ray.distributed.actors import AdapterSource, adapter_actors, start_actors
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.evidence import evidence_key, gather_on_ray, grams_on_ray
from icm_ray.distributed.shared_base import SharedBase, share_base
from icm_ray.evidence.store import save_evidence
from icm_ray.files import refuse_foreign
from icm_ray.learning.tasks import Inputs, load_inputs
from icm_ray.merging.estimate import warn, warnings_of
from icm_ray.suites.bases import prepare_base


def _grams(
    files: list[AdapterFile],
    inputs: Inputs,
    shared: SharedBase,
    folder: Path,
    recipe: MergeRecipe | EvidenceRecipe | LearnRecipe,
    batch: int,
) -> Path:
    with adapter_actors(shared, recipe.resources, len(files)) as actors:
        return grams_on_ray(
            actors,
            [AdapterSource.of(file, recipe.modules_to_save) for file in files],
            sorted({module for file in files for module in file.shapes}),
            inputs,
            folder,
            base=shared.run_as(recipe.resources),
            batch=batch,
            timeout=recipe.resources.timeout_seconds,
        )


def gather_evidence(recipe: EvidenceRecipe, target: Path) -> dict[str, Any]:
    """Gather what the recipe names, one actor an adapter."""
    refuse_foreign(target)
    refs = [(ref.name, Path(ref.path)) for ref in recipe.adapters]
    files = open_all(refs, recipe.modules_to_save)
    warn(warnings_of(files))
    sources = [AdapterSource.of(file, recipe.modules_to_save) for file in files]
    inputs = load_inputs(recipe.data, [source.name for source in sources])
    path = prepare_base(recipe.base, recipe.cache, recipe.revision, progress=print)
    with connected(recipe.resources):
        shared = share_base(path)
        if recipe.kind == "gram_statistics":
            _grams(files, inputs, shared, target, recipe, recipe.batch)
            return {"outputs": {"evidence": str(target)}}
        actors = start_actors(shared, recipe.resources, len(sources))
        timeout = recipe.resources.timeout_seconds
        gathered = gather_on_ray(actors, sources, inputs, batch=recipe.batch, timeout=timeout)
    key = evidence_key(shared.run_as(recipe.resources), sources, inputs, recipe.batch)
    save_evidence(target, gathered, {"key": key, "base": shared.fingerprint})
    norms = {e.task: float(e.task_vector.norm()) for e in gathered}
    print("task vector norms: " + ", ".join(f"{t} {n:.3f}" for t, n in norms.items()))
    return {"outputs": {"evidence": str(target)}, "task_vector_norms": norms}
