"""`jobs.evidence`: what methods and reports must know of adapters and inputs."""

from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import EvidenceRecipe
from icm_ray.distributed.evidence import (
    evidence_key,
    gather_on_ray,
    grams_again_on_ray,
    grams_on_ray,
)
from icm_ray.distributed.session import opened
from icm_ray.evidence.overlap import overlap_lines
from icm_ray.evidence.store import save_evidence
from icm_ray.evidence.tensors import DESCRIPTION
from icm_ray.files import read_json, refuse_foreign
from icm_ray.learning.tasks import load_inputs
from icm_ray.merging.estimate import warn, warnings_of
from icm_ray.workflows.evicting import evicting, without_adapters
from icm_ray.workflows.prepared import data_of, prepared_base, preparing


def adapters_of(recipe: EvidenceRecipe) -> list[AdapterFile]:
    """Open the recipe's adapters, under the names that its base has."""
    refs = [ref.pair for ref in recipe.adapters]
    return open_all(refs, recipe.modules_to_save, base=recipe.base, run_by="jobs.evidence")


def run(recipe: EvidenceRecipe, target: Path) -> dict[str, Any]:
    """Gather what the recipe names, one actor an adapter."""
    return evicting(recipe, without_adapters, lambda rest, _evicted: _gather(rest, target))


def _gather(recipe: EvidenceRecipe, target: Path) -> dict[str, Any]:
    refuse_foreign(target)
    files = adapters_of(recipe)
    warn(warnings_of(files))
    inputs = load_inputs(recipe.data, [file.name for file in files])
    base = prepared_base(recipe, data_of(recipe.data), splits=[recipe.data.split])
    outputs = {"outputs": {"evidence": str(target)}}
    with (
        opened(recipe.resources, base, recipe.seed, preparing(recipe)) as session,
        session.pool(len(files)) as pool,
    ):
        if recipe.kind == "gram_statistics":
            if recipe.again:
                first = target.with_name(f"{target.name}.first")
                grams_on_ray(pool, files, inputs, first, recipe.batch)
                grams_again_on_ray(pool, files, inputs, target, first, recipe.batch)
            else:
                grams_on_ray(pool, files, inputs, target, recipe.batch)
            overlap = read_json(target / DESCRIPTION)["overlap"]
            print("\n".join(overlap_lines(overlap)))
            return {**outputs, "input_overlap": overlap}
        evidence = gather_on_ray(pool, files, inputs, recipe.batch, recipe.position)
    key = evidence_key(session.key, files, inputs, recipe.batch, recipe.position)
    save_evidence(target, evidence, {"key": key, "base": session.shared.fingerprint})
    norms = {e.task: float(e.task_vector.norm()) for e in evidence}
    print("task vector norms: " + ", ".join(f"{t} {n:.3f}" for t, n in norms.items()))
    return {**outputs, "task_vector_norms": norms}
