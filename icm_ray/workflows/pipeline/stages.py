"""From a base and its tasks to one proven adapter: every stage kept by content, all resumable.

experts/<set>/<task>/       adapter, head, losses
trajectories/<set>/<task>/  checkpoints of training
merged/<set>/<row>/<how>/   merged PEFT adapters; <how> is "default" or for example "scale=0.3"
evidence/<set>/             task vectors and null-space ratios
learned/<set>/<row>/        what learned rows learned
fusion/<set>/<hash>/        Fusion-VAEs
ratios/<set>/<row>/         ratios of the first set's learned rows, on test inputs
random/<set>/<task>/        random adapters that controls merge
probes/<task>/              the refitted linear probe and its test predictions
search/<set>/<row>/         what Ray Tune tried for a row with `search`
heads/<set>/<row>/<how>/    heads re-aligned for a merge, if the recipe wants that
scores/<set>-<split>/       scores by content
plan.json                   what is tried if the recipe names no methods
report/                     the page, the table, Parquet and JSON
"""

from collections.abc import Sequence

from icm_ray.config import FinetuneRecipe, MethodRow, ObjectiveSpec, PipelineRecipe
from icm_ray.distributed.evidence import (
    EVIDENCE_BATCH,
    evidence_key,
    gather_on_ray,
    grams_again_on_ray,
    grams_on_ray,
)
from icm_ray.distributed.session import Pool
from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.evidence.store import load_evidence, save_evidence
from icm_ray.files import is_done
from icm_ray.fusion.in_context import context_specs
from icm_ray.fusion.serial import fusion_spec_of, objectives_of
from icm_ray.learning.objectives import OBJECTIVES
from icm_ray.learning.recipes import needs_grams, spec_of
from icm_ray.learning.tasks import load_inputs
from icm_ray.merging.cut import RankRule
from icm_ray.merging.requirements import needs_of, refuse_blind
from icm_ray.methods import find_method
from icm_ray.report.data import REFERENCES
from icm_ray.report.summary import init_of
from icm_ray.suites import find_suite
from icm_ray.workflows.experts import find_or_train, probes_of
from icm_ray.workflows.pipeline.adapters import adapter_problems, ready_set
from icm_ray.workflows.pipeline.controls import control_problems, make_random
from icm_ray.workflows.pipeline.curves import training_curves
from icm_ray.workflows.pipeline.fused import check_fusion_row, fuse_rows
from icm_ray.workflows.pipeline.learned import learn_rows
from icm_ray.workflows.pipeline.offer import offer_rows
from icm_ray.workflows.pipeline.ratios import ratios_of_rows
from icm_ray.workflows.pipeline.rows import choose, merge_rows, score_test
from icm_ray.workflows.pipeline.searched import check_search, search_rows
from icm_ray.workflows.pipeline.table import SetResults, Table, variants


def run_stages(table: Table) -> None:
    """Run every stage that is not done yet."""
    recipe, session = table.recipe, table.session
    if isinstance(recipe, PipelineRecipe) and recipe.adapters:
        table.sets.append(ready_set(recipe))
    else:
        table.probes.update(probes_of(session, recipe, table.root))
        ready = recipe.experts if isinstance(recipe, PipelineRecipe) else None
        experts = find_or_train(session, recipe, table.root, ready)
        table.sets.extend(SetResults(label, of_set) for label, of_set in experts.items())
    with session.pool(len(table.suite.tasks)) as pool:
        if isinstance(recipe, PipelineRecipe) and recipe.methods is None:
            offer_rows(table, pool)
        for one in table.sets:
            _gather(table, one, pool)
    learn_rows(table)
    fuse_rows(table)
    make_random(table)
    merge_rows(table, "default")
    search_rows(table)
    with session.pool(len(table.suite.tasks)) as pool:
        _choose_all(table, pool)
    merge_rows(table, "chosen")
    with session.pool(len(table.suite.tasks)) as pool:
        for one in table.sets:
            score_test(table, one, pool)
        first = table.sets[0]
        table.ratios.update(ratios_of_rows(table, first, pool))
        table.curves.update(training_curves(table, first, pool))


def _choose_all(table: Table, pool: Pool) -> None:
    """Choose settings on validation data: for each set, or with the first one of each init."""
    recipe = table.recipe
    each = not isinstance(recipe, PipelineRecipe) or recipe.tune == "each set"
    leaders: dict[str, SetResults] = {}
    for one in table.sets:
        leader = leaders.setdefault(init_of(one.label), one)
        if each or leader is one:
            choose(table, one, pool)
        else:
            one.chosen.update(leader.chosen)


def check_tasks(recipe: FinetuneRecipe) -> None:
    """Raise RecipeError for every task that the suite does not have."""
    suite = find_suite(recipe.suite)
    problems = [
        f"tasks: {task!r} is no task of suite {suite.name!r}.{did_you_mean(task, suite.tasks)}"
        for task in recipe.tasks or ()
        if task not in suite.tasks
    ]
    if problems:
        raise RecipeError(problems)


def check_rows(recipe: PipelineRecipe) -> None:
    """Check tasks and table before anything is trained.

    Raises:
        RecipeError: every unknown task, method, parameter or rank, and every clash of labels.
    """
    problems = []
    try:
        check_tasks(recipe)
    except RecipeError as error:
        problems += error.problems
    one = ready_set(recipe) if recipe.adapters else None
    problems += adapter_problems(recipe, one) if one else []
    tasks = [*one.experts, *one.unproven] if one else []
    tasks = tasks or list(recipe.tasks or find_suite(recipe.suite).tasks)
    given = recipe.methods or []
    names = [row.name for row in given]
    suite = find_suite(recipe.suite)
    if recipe.realign_heads and not any(suite.task(t).headed for t in tasks if t in suite):
        problems.append("realign_heads: no task is read through a head. Leave it out.")
    if recipe.budget and recipe.methods is not None:
        problems.append("budget: chooses among methods, but they are named. Leave one out.")
    for name in sorted(set(names)):
        if name in REFERENCES:
            problems.append(f"methods: {name!r} is a reference of the table. Set another label.")
        if names.count(name) > 1:
            problems.append(f"methods: {name!r} names {names.count(name)} rows. Set labels.")
    for row in given:
        strange = sorted(set(row.tasks or ()) - set(tasks))
        problems += [
            f"methods.{row.name}.tasks: {task!r} has no expert.{did_you_mean(task, tasks)}"
            for task in strange
        ]
        try:
            method = find_method(row.method)
            if row.fusion or row.in_context or method.needs == "fusion_model":
                check_fusion_row(row)
                objectives = objectives_of(fusion_spec_of(row.fusion))
            elif row.learn or method.needs == "learned_merge":
                objectives = [spec_of(row.method, row.learn).objective]
            else:
                objectives = []
            problems += _label_problems(recipe, row, objectives)
            problems += control_problems(row)
            problems += _again_problems(row)
            check_search(row)
            RankRule.parse(row.rank, method.default_rank, recipe.lora.rank)
            refuse_blind(row.method, row.metric)
            for variant in variants(row):
                method.bind(variant.params, row.tasks or tasks)
        except RecipeError as error:
            problems += [f"methods.{row.name}: {line}" for line in error.problems]
    grams = recipe.resources.grams
    if not problems and given and grams != "full" and not rows_need_grams(given):
        problems.append(f"resources.grams: {grams} but no row reads any. Leave it out.")
    if problems:
        raise RecipeError(dict.fromkeys(problems))


def _label_problems(
    recipe: PipelineRecipe, row: MethodRow, objectives: Sequence[ObjectiveSpec]
) -> list[str]:
    """Return a line if a row reads labels that a task's examples lack."""
    suite = find_suite(recipe.suite)
    if not any(OBJECTIVES[objective.kind].reads_labels for objective in objectives):
        return []
    tasks = [task for task in recipe.tasks or suite.tasks if row.tasks is None or task in row.tasks]
    bare = [task for task in tasks if task in suite and not suite.task(task).labelled]
    return [
        f"methods.{row.name}: reads labels, but {task} has no answers. Leave the row out."
        for task in bare[:1]
    ]


def _again_problems(row: MethodRow) -> list[str]:
    """Return what a row cannot have that reads Gram statistics through a merge."""
    if not row.again:
        return []
    if row.tasks:
        return ["again: through a merge of all tasks, but the row names some. Leave one out."]
    if not rows_need_grams([row]):
        return [f"again: {row.method} reads no Gram statistics. Leave it out."]
    return []


def rows_need_grams(rows: Sequence[MethodRow]) -> bool:
    """Say whether a row merges with Gram statistics, or learns from a start that has them."""
    needs = [(row, needs_of(row.method, row.metric)) for row in rows]
    starts = [spec_of(row.method, row.learn) for row, kind in needs if kind == "learned_merge"]
    starts += [
        context_specs(row.in_context, row.learn)[0]
        for row, kind in needs
        if kind == "fusion_model" and row.in_context
    ]
    return any(kind == "gram_statistics" for _, kind in needs) or any(map(needs_grams, starts))


def _gather(table: Table, one: SetResults, pool: Pool) -> None:
    """Gather a set's task vectors, and its Gram statistics if a row needs them."""
    files, root = one.proven(), table.root / "evidence"
    inputs = load_inputs(table.inputs(), list(one.experts))
    if rows_need_grams(table.rows):
        one.grams = grams_on_ray(pool, files, inputs, root / f"{one.label}-grams")
        if any(row.again for row in table.rows):
            again = root / f"{one.label}-grams-again"
            one.grams_again = grams_again_on_ray(pool, files, inputs, again, one.grams)
    one.evidence = root / one.label
    key = evidence_key(table.session.key, files, inputs, EVIDENCE_BATCH)
    if not is_done(one.evidence, key):
        save_evidence(one.evidence, gather_on_ray(pool, files, inputs), {"key": key})
    load_evidence(one.evidence, {file.name: file.fingerprint for file in files})
