"""From a base and six tasks to one proven adapter: every stage kept by content, all resumable.

experts/<set>/<task>/       adapter, head, losses
trajectories/<set>/<task>/  checkpoints of the second half of training
merged/<set>/<row>/<how>/   merged PEFT adapters; <how> is "default" or for example "scale=0.3"
evidence/<set>/             task vectors and null-space ratios
probes/<task>/              the refitted linear probe and its test predictions
scores/<set>-<split>/       scores by content
report/                     the page, the table, Parquet and JSON
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import DataSpec, FinetuneRecipe, MethodRow, PipelineRecipe
from icm_ray.distributed.actors import AdapterSource, start_actors
from icm_ray.distributed.evaluate import ScoreItem, score_on_ray
from icm_ray.distributed.evidence import evidence_key, gather_on_ray, load_inputs
from icm_ray.distributed.finetune import finetune
from icm_ray.distributed.merge import merge_on_ray
from icm_ray.distributed.probes import fit_probes, read_probe
from icm_ray.distributed.shared_base import SharedBase, share_base
from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.metrics import score
from icm_ray.evaluation.scoring import TaskData, TaskScore, standing
from icm_ray.evidence.store import load_evidence, save_evidence
from icm_ray.files import is_done, sha256_of
from icm_ray.methods.cut import RankRule
from icm_ray.methods.merge import find_method
from icm_ray.output import MergedFolder, read_merged, write_merged
from icm_ray.report.data import REFERENCES
from icm_ray.suites import SUITES, Suite

BATCH = 64
EVIDENCE_BATCH = 32


@dataclass(frozen=True)
class Variant:
    """One merge of the table: a row and one setting of its parameters.

    Attributes:
        row: The table's row.
        params: Parameters of this setting.
        name: "default", or the grid point such as "scale=0.3".
    """

    row: MethodRow
    params: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class SetResults:
    """All that was measured with one set of experts.

    Attributes:
        label: The set, for example "shared-seed0".
        experts: Experts by task.
        merged: Every merged folder by (row, variant).
        chosen: By row that has a grid: the variant that was best on validation data.
        scores: By (row or reference, variant, split): scores by task.
    """

    label: str
    experts: Mapping[str, Expert]
    merged: Mapping[tuple[str, str], MergedFolder]
    chosen: dict[str, str] = field(default_factory=dict)
    scores: dict[tuple[str, str, str], dict[str, TaskScore]] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineResults:
    """Everything the report is made from."""

    recipe: PipelineRecipe
    suite: Suite
    base: SharedBase
    base_path: Path
    sets: list[SetResults]
    probes: Mapping[str, Path]
    evidence: Mapping[str, Path]


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
    probes = fit_probes(suite, tasks, recipe.training, recipe.sizes, shared, recipe.resources, root)
    experts = _experts(recipe, shared, base_name, root)
    sets = [
        SetResults(label, found, _merges(recipe, label, found, root))
        for label, found in experts.items()
    ]
    actors = start_actors(shared, recipe.resources, len(suite.tasks))
    evidence = {s.label: _evidence(recipe, s, shared, actors, root) for s in sets}
    for results in sets:
        _score(recipe, suite, results, shared, actors, root)
    return PipelineResults(recipe, suite, shared, base_path, sets, probes, evidence)


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


def variants(row: MethodRow) -> Iterator[Variant]:
    """Yield a row's default setting and every point of its grid."""
    yield Variant(row, row.params, "default")
    for point in product(*row.grid.values()) if row.grid else ():
        values = dict(zip(row.grid, point, strict=True))
        name = ",".join(f"{key}={value:g}" for key, value in values.items())
        yield Variant(row, {**row.params, **values}, name)


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
        try:
            method = find_method(row.method)
            RankRule.parse(row.rank, method.default_rank, recipe.lora.rank)
            for variant in variants(row):
                method.bind(variant.params, tasks)
        except RecipeError as error:
            problems += [f"methods.{row.name}: {line}" for line in error.problems]
    if problems:
        raise RecipeError(dict.fromkeys(problems))


def _merges(
    recipe: PipelineRecipe, label: str, experts: Mapping[str, Expert], root: Path
) -> dict[tuple[str, str], MergedFolder]:
    files = open_all([(task, expert.adapter) for task, expert in experts.items()])
    return {
        (row.name, variant.name): _merge(recipe, variant, files, root / "merged" / label)
        for row in recipe.methods
        for variant in variants(row)
    }


def _merge(
    recipe: PipelineRecipe, variant: Variant, files: list[AdapterFile], root: Path
) -> MergedFolder:
    """Merge unless it is there; written, reloaded with PEFT and compared before it counts."""
    folder = root / variant.row.name / variant.name
    order = {
        "method": variant.row.method,
        "params": dict(variant.params),
        "output_rank": variant.row.rank,
        "seed": recipe.seed,
    }
    key = sha256_of([order, {file.name: file.fingerprint() for file in files}])
    if not is_done(folder, key):
        started = time.monotonic()
        result = merge_on_ray(files, resources=recipe.resources, **order)
        seconds = time.monotonic() - started
        paths = {file.name: str(file.path) for file in files}
        write_merged(result, folder, key=key, inputs=paths, seconds=seconds)
    return read_merged(folder)


def _sources(experts: Mapping[str, Expert]) -> list[AdapterSource]:
    files = open_all([(task, expert.adapter) for task, expert in experts.items()])
    return [AdapterSource(f.name, str(f.path), f.fingerprint()) for f in files]


def _merged_source(merged: MergedFolder) -> AdapterSource:
    return AdapterSource(merged.folder.name, str(merged.folder), merged.fingerprint)


def _evidence(
    recipe: PipelineRecipe,
    results: SetResults,
    shared: SharedBase,
    actors: list[Any],
    root: Path,
) -> Path:
    folder = root / "evidence" / results.label
    sources = _sources(results.experts)
    spec = DataSpec(suite=recipe.suite, inputs_per_task=recipe.sizes.calibration)
    inputs = load_inputs(spec, [source.name for source in sources])
    key = evidence_key(shared.fingerprint, sources, inputs, EVIDENCE_BATCH)
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


def _score(
    recipe: PipelineRecipe,
    suite: Suite,
    results: SetResults,
    shared: SharedBase,
    actors: list[Any],
    root: Path,
) -> None:
    """Score references and merges; grids on validation data, then what was chosen on test."""
    tasks = tuple(results.experts)

    def run(split: str, wanted: list[tuple[str, str]]) -> None:
        data = task_data(suite, results.experts, split, getattr(recipe.sizes, split))
        items = [ScoreItem("base", None, tasks)]
        items += [ScoreItem(f"expert {s.name}", s, (s.name,)) for s in _sources(results.experts)]
        items += [ScoreItem("/".join(k), _merged_source(results.merged[k]), tasks) for k in wanted]
        found = score_on_ray(
            actors,
            items,
            data,
            root / "scores" / f"{results.label}-{split}",
            base=shared.fingerprint,
            batch=BATCH,
            timeout=recipe.resources.timeout_seconds,
        )
        results.scores["base", "default", split] = found["base"]
        results.scores["expert", "default", split] = {t: found[f"expert {t}"][t] for t in tasks}
        for key in wanted:
            results.scores[(*key, split)] = found["/".join(key)]

    tuned = {row.name for row in recipe.methods if row.grid}
    run("validation", [key for key in results.merged if key[0] in tuned])
    for row in tuned:
        results.chosen[row] = _best(results, row)
    run("test", [k for k in results.merged if k[1] in ("default", results.chosen.get(k[0]))])


def task_data(
    suite: Suite, experts: Mapping[str, Expert], split: str, limit: int
) -> dict[str, TaskData]:
    """Return each task's examples of a split with its expert's head."""
    return {
        task: TaskData(suite.tasks[task], suite.load(task, split, limit), expert.head())
        for task, expert in experts.items()
    }


def _best(results: SetResults, row: str) -> str:
    """Return the row's variant with the best mean normalised score on validation data."""
    expert = values(results.scores["expert", "default", "validation"])
    base = values(results.scores["base", "default", "validation"])
    means = {
        variant: standing(values(results.scores[row, variant, "validation"]), expert, base).mean
        for name, variant in results.merged
        if name == row
    }
    # NaN: an expert scored nothing, so nothing can be compared with it.
    return max(means, key=lambda v: -math.inf if math.isnan(means[v]) else means[v])


def values(scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """Return the plain score of each task."""
    return {task: item.score.value for task, item in scores.items()}


def probe_scores(results: PipelineResults) -> dict[str, TaskScore]:
    """Return the linear probe's test scores by task."""
    found = {}
    for task, folder in results.probes.items():
        _, predictions = read_probe(folder)
        examples = results.suite.load(task, "test", results.recipe.sizes.test)
        item = score(results.suite.tasks[task], predictions, examples.targets)
        found[task] = TaskScore(item, predictions)
    return found
