"""Merging and what it needs, from a checked recipe to a folder: evidence, learning, the merge."""

import contextlib
import time
from pathlib import Path
from statistics import mean
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import DataSpec, EvidenceRecipe, LearnRecipe, LearnSpec, MergeRecipe, Recipe
from icm_ray.distributed.actors import AdapterSource, adapter_actors, start_actors
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.evidence import (
    EVIDENCE_BATCH,
    Inputs,
    evidence_key,
    gather_on_ray,
    grams_on_ray,
    load_inputs,
)
from icm_ray.distributed.in_context import Context, context_specs
from icm_ray.distributed.learn import LEARNED, Readable, learned_on_ray, readable_experts
from icm_ray.distributed.learned_report import learned_row
from icm_ray.distributed.merge import merge_on_ray
from icm_ray.distributed.shared_base import SharedBase, share_base
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import find_experts
from icm_ray.evidence.store import save_evidence
from icm_ray.files import refuse_foreign, whole_folder
from icm_ray.fusion.latent import check_beneath
from icm_ray.fusion.serial import FUSES
from icm_ray.fusion.store import load_fusion
from icm_ray.learning.recipes import LABELLED, reads_heads, spec_of
from icm_ray.learning.store import load_learned
from icm_ray.merging import merge_recipe
from icm_ray.methods.merge import find_method
from icm_ray.planning import warn, warnings_of
from icm_ray.report import learned_page
from icm_ray.suites import BASES, SUITES, prepare_base
from icm_ray.types import MergeResult


def base_folder(recipe: Recipe, spec: str, revision: str | None) -> Path:
    """Return the prepared base's folder, fetching it if it is not cached."""
    cache = Path(recipe.cache) if recipe.cache else None
    return prepare_base(spec, cache, revision, progress=print)


def base_name(spec: str) -> str:
    """Return what an adapter's config calls this base: a name that means something elsewhere."""
    return BASES[spec].hub_id if spec in BASES else spec


def merge_and_write(recipe: MergeRecipe, target: Path) -> dict[str, Any]:
    """Merge on Ray and write the verified result; see `MergeRecipe`."""
    with contextlib.ExitStack() as session:  # checks come first; then one cluster for all stages

        def on_ray(files: list[AdapterFile], order: dict[str, Any]) -> tuple[MergeResult, float]:
            session.enter_context(connected(recipe.resources))
            started = time.monotonic()
            result = merge_on_ray(files, recipe.method, resources=recipe.resources, **order)
            return result, time.monotonic() - started

        def gathered(files: list[AdapterFile], base: Path) -> Path:
            assert recipe.data is not None
            inputs = load_inputs(recipe.data, [file.name for file in files])
            folder = target.with_name(f"{target.name}.evidence")
            if find_method(recipe.method).needs == LEARNED:
                spec = spec_of(recipe.method, recipe.learn)
                readable = readable_of(None, recipe.data, spec, files)
                session.enter_context(connected(recipe.resources))
                return _learned(spec, files, inputs, readable, base, folder, recipe)
            session.enter_context(connected(recipe.resources))
            return _grams(files, inputs, share_base(base), folder, recipe, EVIDENCE_BATCH)

        return merge_recipe(recipe, target, on_ray, gathered)


def learn_and_write(recipe: LearnRecipe, target: Path) -> dict[str, Any]:
    """Learn a merge from unlabelled inputs, one actor a task; `merge` reads what it writes."""
    refuse_foreign(target)
    if (find_method(recipe.method).needs == FUSES) != bool(recipe.fusion):
        raise RecipeError(
            f"fusion: {recipe.fusion!r} with method {recipe.method!r}. Name the folder of "
            "jobs.train_fusion for icm_fusion, and for no other method."
        )
    context = None
    if recipe.fusion:
        spec, direct = context_specs(recipe.in_context, recipe.learn)
        context = Context(Path(recipe.fusion), direct)
    else:
        spec = spec_of(recipe.method, recipe.learn)
    refs = [(ref.name, Path(ref.path)) for ref in recipe.adapters]
    files = open_all(refs, recipe.modules_to_save)
    if context:  # before any spend; it is read again where it is used
        model = load_fusion(context.fusion)
        model.check_adapters({f.name: f.fingerprint() for f in files})
        if spec.start.residual:
            check_beneath(model.layout.gauge)
    readable = readable_of(recipe.heads, recipe.data, spec, files)
    inputs = load_inputs(recipe.data, [file.name for file in files])
    warn(warnings_of(files))
    base = base_folder(recipe, recipe.base, recipe.revision)
    with connected(recipe.resources):
        _learned(spec, files, inputs, readable, base, target, recipe, context)
    told = load_learned(target).report
    for task, line in told["warnings"].items():
        warn([f"{task}: {line}"])
    first = told.get("latent", told)  # of two stages
    losses = {
        task: {
            "start": mean(first["losses"][task]["start"]),
            "end": mean(found["end"]),
        }
        for task, found in told["losses"].items()
    }
    for task, loss in losses.items():
        print(f"{task}: loss {loss['start']:.4f} at the start, {loss['end']:.4f} at the end")
    if told["unmoved"]:
        print(f"no path to a target, left at the start: {', '.join(told['unmoved'])}")
    report = _learned_page(recipe.method, target, files)
    return {"outputs": {"evidence": str(target), "report": str(report)}, "losses": losses}


def _learned_page(method: str, target: Path, files: list[AdapterFile]) -> Path:
    """Write the page about what was learned into a folder beside it; return the page."""
    with whole_folder(target.with_name(f"{target.name}.report")) as folder:
        page = learned_page(learned_row(method, target, files))
        (folder / "index.html").write_text(page, encoding="utf-8")
    return target.with_name(f"{target.name}.report") / "index.html"


def readable_of(
    heads: str | None, data: DataSpec, spec: LearnSpec, files: list[AdapterFile]
) -> dict[str, Readable]:
    """Return the heads and labels an objective may read.

    Args:
        heads: Folder of experts.
        data: Which inputs; their labels are read for supervised objectives alone.
        spec: Names the objective.
        files: The adapters.

    Raises:
        RecipeError: it reads heads and none are named, or the tasks' kinds are not known.
    """
    kind = spec.objective.kind
    if not reads_heads(spec):
        return {}
    if heads is None or data.suite is None:
        raise RecipeError(
            f"heads: objective {kind!r} reads the experts' heads. Run jobs.learn with heads: (a "
            "folder of experts) and data.suite, or choose an objective that reads none."
        )
    suite, experts = SUITES[data.suite], find_experts(Path(heads))
    missing = sorted({file.name for file in files} - set(experts))
    if missing:
        raise RecipeError(f"heads: {heads}: none for {', '.join(missing)}. Name their experts.")
    return readable_experts(
        suite,
        experts,
        [file.name for file in files],
        data,
        labelled=kind in LABELLED,
    )


def _learned(
    spec: LearnSpec,
    files: list[AdapterFile],
    inputs: Inputs,
    readable: dict[str, Readable],
    base: Path,
    folder: Path,
    recipe: MergeRecipe | LearnRecipe,
    context: Context | None = None,
) -> Path:
    grams, shared = folder.with_name(f"{folder.name}.grams"), share_base(base)
    return learned_on_ray(
        spec,
        files,
        inputs,
        readable,
        folder,
        base=base,
        shared=shared,
        resources=recipe.resources,
        seed=recipe.seed,
        grams=lambda: _grams(files, inputs, shared, grams, recipe, EVIDENCE_BATCH),
        label=recipe.method,
        context=context,
    )


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
    path = base_folder(recipe, recipe.base, recipe.revision)
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
