"""From a base and six tasks to one proven adapter: every stage kept by content, all resumable.

experts/<set>/<task>/       adapter, head, losses
trajectories/<set>/<task>/  checkpoints of the second half of training
merged/<set>/<row>/<how>/   merged PEFT adapters; <how> is "default" or for example "scale=0.3"
evidence/<set>/             task vectors and null-space ratios
ratios/<set>/<row>/         ratios of the first set's learned rows, on test inputs
probes/<task>/              the refitted linear probe and its test predictions
scores/<set>-<split>/       scores by content
report/                     the page, the table, Parquet and JSON
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from icm_ray.config import FinetuneRecipe, PipelineRecipe
from icm_ray.distributed.actors import AdapterSource, adapter_actors
from icm_ray.distributed.evidence import evidence_key, gather_on_ray, grams_on_ray
from icm_ray.distributed.finetune import finetune
from icm_ray.distributed.probes import fit_probes
from icm_ray.distributed.shared_base import SharedBase, share_base
from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.evaluation.experts import Expert
from icm_ray.evidence.store import load_evidence, save_evidence
from icm_ray.files import is_done
from icm_ray.fusion.in_context import context_specs
from icm_ray.learning.recipes import needs_grams, spec_of
from icm_ray.learning.tasks import EVIDENCE_BATCH, Inputs, load_inputs
from icm_ray.merging.cut import RankRule
from icm_ray.methods import find_method
from icm_ray.methods.table import FUSES, LEARNED
from icm_ray.report.data import REFERENCES
from icm_ray.suites import SUITES, Suite
from icm_ray.workflows.pipeline.fused import check_fusion_row, fuse_rows, fusion_rows
from icm_ray.workflows.pipeline.learned import learn_rows, learned_rows
from icm_ray.workflows.pipeline.ratios import ratios_of_rows, training_ratios
from icm_ray.workflows.pipeline.results import PipelineResults, SetResults, variants
from icm_ray.workflows.pipeline.rows import choose, inputs_spec, merge_rows, score_test


def run_pipeline(
    recipe: PipelineRecipe, base_path: Path, base_name: str, root: Path
) -> PipelineResults:
    """Run every stage that is not done yet; call inside `cluster.connected`.

    Args:
        recipe: What to run.
        base_path: The prepared base.
        base_name: What the adapters name as their base.
        root: Output folder; a second run of the same recipe only reads it.
    """
    suite = SUITES[recipe.suite]
    shared = share_base(base_path)
    tasks = list(recipe.tasks or suite.tasks)
    headed = [task for task in tasks if suite.tasks[task].headed]
    probes = fit_probes(
        suite, headed, recipe.training, recipe.sizes, shared, recipe.resources, root
    )
    experts = _experts(recipe, shared, base_name, root)
    sets = [SetResults(label, found) for label, found in experts.items()]
    sets = _grams(recipe, sets, shared, root)
    sets = learn_rows(recipe, suite, sets, base_path, shared, root)
    sets = _fused(recipe, suite, sets, base_path, shared, root)
    merge_rows(recipe, sets, "default", root)
    with adapter_actors(shared, recipe.resources, len(suite.tasks)) as actors:
        evidence = {s.label: _evidence(recipe, s, shared, actors, root) for s in sets}
        first: dict[str, SetResults] = {}
        for which, results in zip(recipe.sets, sets, strict=True):
            leader = first.setdefault(which.init, results)
            if recipe.tune == "each set" or leader is results:
                choose(recipe, suite, results, shared, actors, root)
            else:
                results.chosen.update(leader.chosen)
    merge_rows(recipe, sets, "chosen", root)
    with adapter_actors(shared, recipe.resources, len(suite.tasks)) as actors:
        for results in sets:
            score_test(recipe, suite, results, shared, actors, root)
        ratios = ratios_of_rows(
            recipe, suite, sets[0], actors, shared.run_as(recipe.resources), root
        )
        trained = training_ratios(recipe, suite, sets[0], actors, root)
    return PipelineResults(
        recipe, suite, shared, base_path, sets, probes, evidence, ratios, trained
    )


def _fused(
    recipe: PipelineRecipe,
    suite: Suite,
    sets: Sequence[SetResults],
    base: Path,
    shared: SharedBase,
    root: Path,
) -> list[SetResults]:
    """Return the sets with what fusion rows merge with; their task vectors are gathered first."""
    if not fusion_rows(recipe):
        return list(sets)
    with adapter_actors(shared, recipe.resources, len(sets[0].experts)) as actors:
        folders = {one.label: _evidence(recipe, one, shared, actors, root) for one in sets}
    vectors = {label: load_evidence(folder)[0].vectors for label, folder in folders.items()}
    return fuse_rows(recipe, suite, sets, vectors, base, shared, root)


def _experts(
    recipe: PipelineRecipe, shared: SharedBase, base_name: str, root: Path
) -> dict[str, dict[str, Expert]]:
    """Return experts by set and task: those the recipe names if they fit it, else trained ones."""
    names = ("storage", "resources", "seed", "cache", "suite", "tasks", "base", "revision")
    names += ("lora", "training", "sets", "sizes", "dtype")
    values = {name: getattr(recipe, name) for name in names}
    order = FinetuneRecipe(**values, output=recipe.output)
    folders = finetune(order, shared, base_name, root, ready=recipe.experts)
    found: dict[str, dict[str, Expert]] = {}
    for (label, task), folder in folders.items():
        found.setdefault(label, {})[task] = Expert(task, folder)
    return found


def check_rows(recipe: PipelineRecipe) -> None:
    """Check tasks and table before anything is trained.

    Raises:
        RecipeError: every unknown task, method, parameter or rank, and every clash of labels.
    """
    suite = SUITES[recipe.suite]
    tasks = list(recipe.tasks or suite.tasks)
    problems = [
        f"tasks: {task!r} is no task of suite {suite.name!r}.{did_you_mean(task, suite.tasks)}"
        for task in tasks
        if task not in suite.tasks
    ]
    names = [row.name for row in recipe.methods]
    for name in sorted(set(names)):
        if name in REFERENCES:
            problems.append(f"methods: {name!r} is a reference of the table. Set another label.")
        if names.count(name) > 1:
            problems.append(f"methods: {name!r} names {names.count(name)} rows. Set labels.")
    for row in recipe.methods:
        strange = sorted(set(row.tasks or ()) - set(tasks))
        problems += [
            f"methods.{row.name}.tasks: {task!r} has no expert.{did_you_mean(task, tasks)}"
            for task in strange
        ]
        try:
            method = find_method(row.method)
            if row.fusion or row.in_context or method.needs == FUSES:
                check_fusion_row(row)
            elif row.learn or method.needs == LEARNED:
                spec_of(row.method, row.learn)
            RankRule.parse(row.rank, method.default_rank, recipe.lora.rank)
            for variant in variants(row):
                method.bind(variant.params, row.tasks or tasks)
        except RecipeError as error:
            problems += [f"methods.{row.name}: {line}" for line in error.problems]
    if problems:
        raise RecipeError(dict.fromkeys(problems))


def rows_need_grams(recipe: PipelineRecipe) -> bool:
    """Say whether a row merges with Gram statistics, or learns from a start that has them."""
    needs = {find_method(row.method).needs for row in recipe.methods}
    adapted = [row for row in fusion_rows(recipe) if row.in_context]
    starts = [spec_of(row.method, row.learn) for row in learned_rows(recipe)]
    starts += [context_specs(row.in_context, row.learn)[0] for row in adapted]
    return "GramStatistics" in needs or any(map(needs_grams, starts))


def _grams(
    recipe: PipelineRecipe, sets: Sequence[SetResults], shared: SharedBase, root: Path
) -> list[SetResults]:
    """Return the sets with their Gram statistics, gathered if a row of the table needs them."""
    if not rows_need_grams(recipe):
        return list(sets)
    with adapter_actors(shared, recipe.resources, len(sets[0].experts)) as actors:
        return [replace(one, grams=_grams_of(recipe, one, shared, actors, root)) for one in sets]


def _grams_of(
    recipe: PipelineRecipe,
    one: SetResults,
    shared: SharedBase,
    actors: list[Any],
    root: Path,
) -> Path:
    files = one.files()
    return grams_on_ray(
        actors,
        [AdapterSource.of(file) for file in files],
        sorted({module for file in files for module in file.shapes}),
        _inputs(recipe, one),
        root / "evidence" / f"{one.label}-grams",
        base=shared.run_as(recipe.resources),
        batch=EVIDENCE_BATCH,
        timeout=recipe.resources.timeout_seconds,
    )


def _inputs(recipe: PipelineRecipe, one: SetResults) -> Inputs:
    return load_inputs(inputs_spec(recipe), list(one.experts))


def _evidence(
    recipe: PipelineRecipe,
    results: SetResults,
    shared: SharedBase,
    actors: list[Any],
    root: Path,
) -> Path:
    folder = root / "evidence" / results.label
    sources = [AdapterSource.of(file) for file in results.files()]
    inputs = _inputs(recipe, results)
    key = evidence_key(shared.run_as(recipe.resources), sources, inputs, EVIDENCE_BATCH)
    if not is_done(folder, key):
        gathered = gather_on_ray(
            actors,
            sources,
            inputs,
            batch=EVIDENCE_BATCH,
            timeout=recipe.resources.timeout_seconds,
        )
        save_evidence(folder, gathered, {"key": key})
    load_evidence(folder, {s.name: str(s.fingerprint) for s in sources})
    return folder
