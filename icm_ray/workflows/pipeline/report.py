"""From pipeline results to the report's plain values, and the one adapter a run recommends."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from icm_ray.adapters import open_all
from icm_ray.distributed.scores import VERSION
from icm_ray.evaluation.metrics import Score, difference_interval
from icm_ray.evaluation.scoring import TaskScore, standing, values
from icm_ray.evidence.store import load_evidence
from icm_ray.files import cost_of, is_done, sha256_of, whole_folder
from icm_ray.linalg import lowrank
from icm_ray.merging.folder import MergedFolder, write_merged
from icm_ray.merging.merge import merge
from icm_ray.report import (
    BASE,
    EXPERT,
    PROBE,
    ReportData,
    ScoreRow,
    console_table,
    summarise,
    write_report,
)
from icm_ray.report.data import OF_TASKS
from icm_ray.suites import BASES
from icm_ray.types import Adapter
from icm_ray.workflows.pipeline.learned_report import learned_report
from icm_ray.workflows.pipeline.results import (
    PipelineResults,
    SetResults,
    order_of,
    probe_scores,
    variants,
)

NOTES = (
    "A score is normalised by the task's own expert: 1 is as good as the expert. Gain kept is the "
    "share of the expert's gain over the frozen base with the same head.",
    "Settings marked as tuned were chosen on validation data; the test split scores only what "
    "was chosen, and the default setting of each method.",
    f"Rows that end in {OF_TASKS} score each task with an adapter of its own that the method makes "
    "besides the common one; they answer an easier question and are no winners of this page.",
    "Intervals cover the sampling of test examples. The spread over expert sets is shown apart.",
)


def report_data(results: PipelineResults, root: Path) -> ReportData:
    """Collect everything the page shows."""
    rows = [row for one in results.sets for row in _rows(results, one)]
    first = results.sets[0]
    vectors, ratios = load_evidence(results.evidence[first.label])
    default = {row: m for (row, variant), m in first.merged.items() if variant == "default"}
    return ReportData(
        title=f"{results.recipe.name}: {len(first.experts)} tasks, "
        f"{len(results.sets)} sets of experts",
        command=_command(),
        base=_base(results),
        tasks=_tasks(results, root),
        scores=rows,
        ratios={
            task: {m: (ratios.base[task][m], value) for m, value in modules.items()}
            for task, modules in ratios.expert.items()
        },
        task_vector_cosines=_cosines(vectors.vectors),
        delta_cosines=_delta_cosines(first),
        retained_energy={
            row: {m: r["retained_energy"] for m, r in merged.report["modules"].items()}
            for row, merged in default.items()
        },
        expert_gains={one.label: _expert_gains(results, one) for one in results.sets},
        **learned_report(results),
        notes=NOTES,
    )


def publish(results: PipelineResults, data: ReportData, root: Path) -> dict[str, str]:
    """Write the report, and beside it the best merged adapter with its scores on its card."""
    with whole_folder(root / "report") as folder:
        write_report(data, folder)
    outputs = {"report": str(root / "report" / "index.html")}
    best = _best_row(results, data)
    if best is not None:
        outputs["adapter"] = str(_publish_adapter(results, data, *best, root / "adapter"))
    return outputs


def console(data: ReportData) -> None:
    """Print the table of test scores."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(console_table(data))


def _rows(results: PipelineResults, one: SetResults) -> list[ScoreRow]:
    found = [
        row
        for (name, variant, split), scores in one.scores.items()
        for row in _score_rows(results, one, name, variant, split, scores)
    ]
    probes = probe_scores(results)
    return found + _score_rows(results, one, PROBE, "default", "test", probes) if probes else found


def _score_rows(
    results: PipelineResults,
    one: SetResults,
    name: str,
    variant: str,
    split: str,
    scores: dict[str, TaskScore],
) -> list[ScoreRow]:
    expert = values(one.scores[EXPERT, "default", split])
    where = standing(values(scores), expert, values(one.scores[BASE, "default", split]))
    merged = one.merged.get((name.removesuffix(OF_TASKS), variant))
    ranks = [m["rank"] for m in merged.report["modules"].values()] if merged else [0]
    # The default setting can be the best one, and then stands in both rows.
    shown = [False] * (variant == "default") + [True] * (one.chosen.get(name) == variant)
    lora = results.recipe.lora.rank if name == EXPERT else 0
    row_of = {row.name: row for row in results.recipe.methods}.get(name.removesuffix(OF_TASKS))
    merged_tasks = row_of.tasks if row_of else None

    def row(task: str, score: Score, tuned: bool) -> ScoreRow:
        return ScoreRow(
            expert_set=one.label,
            method=name,
            tuned=tuned,
            params=variant if tuned or variant != "default" else "",
            rank=max(ranks) or lora,
            task=task,
            split="test" if split == "test" else "validation",
            metric=score.metric,
            score=score.value,
            low=score.low,
            high=score.high,
            spearman=score.spearman,
            **score.details,
            normalised=_number(where.normalised[task]),
            gain_kept=_number(where.gain_kept[task]),
            seconds=_seconds(one, name, merged),
            seen=merged_tasks is None or task in merged_tasks,
        )

    return [row(task, item.score, tuned) for tuned in shown for task, item in scores.items()]


def _seconds(one: SetResults, name: str, merged: MergedFolder | None) -> float:
    """Return what a merge took, learning included."""
    return cost_of(one.made_for(name)) + (merged.run.get("seconds", 0.0) if merged else 0.0)


def _expert_gains(results: PipelineResults, one: SetResults) -> dict[str, tuple[float, float]]:
    """Return paired intervals of expert minus probe, or minus the base for tasks without a head.

    Both answered the same examples.
    """
    below = {**one.scores[BASE, "default", "test"], **probe_scores(results)}
    return {
        task: difference_interval(
            results.suite.tasks[task],
            expert.predictions,
            below[task].predictions,
            results.suite.load(task, "test", results.recipe.sizes.test).targets,
        )
        for task, expert in one.scores[EXPERT, "default", "test"].items()
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _tasks(results: PipelineResults, root: Path) -> dict[str, dict[str, str | int]]:
    size = results.recipe.sizes.test
    reads = sum(1 for s in results.sets for _ in (root / "scores" / f"{s.label}-test").glob("*"))
    return {
        name: {
            "kind": task.kind,
            "metric": task.metric,
            "classes": len(task.classes),
            "source": task.source,
            "licence": task.licence,
            "test_examples": size,
            "test_hash": results.suite.split_hash(name, "test", size),
            "test_reads": reads,
        }
        for name, task in results.suite.tasks.items()
        if name in results.sets[0].experts
    }


def _base(results: PipelineResults) -> dict[str, str]:
    spec = results.recipe.base or results.suite.base
    known = BASES.get(spec)
    return {
        "name": known.hub_id if known else spec,
        "fingerprint": results.base.fingerprint,
        "licence": known.licence if known else "see the model's own card",
        "note": known.note if known else "",
    }


def _cosines(vectors: Any) -> dict[str, dict[str, float]]:
    unit = {task: v.double() / v.double().norm().clamp(min=1e-12) for task, v in vectors.items()}
    return {t: {o: float(unit[t] @ unit[o]) for o in sorted(unit)} for t in sorted(unit)}


def _delta_cosines(one: SetResults) -> dict[str, dict[str, float]]:
    files = open_all([(task, expert.adapter) for task, expert in one.experts.items()])
    adapters = {file.name: file.load() for file in files}
    gram = {t: {o: inner(adapters[t], adapters[o]) for o in adapters} for t in adapters}
    return {
        t: {o: gram[t][o] / max((gram[t][t] * gram[o][o]) ** 0.5, 1e-30) for o in adapters}
        for t in adapters
    }


def inner(one: Adapter, other: Adapter) -> float:
    """Return the Frobenius inner product of two adapters' deltas over their shared modules."""
    shared = sorted(set(one.modules) & set(other.modules))
    pairs = ((one.modules[m], other.modules[m]) for m in shared)
    return sum(lowrank.inner(f.b, f.a, g.b, g.a) for f, g in pairs)


def _best_row(results: PipelineResults, data: ReportData) -> tuple[str, str, bool] | None:
    """Return set, method and whether tuned of the best row by validation, else by name."""
    rows = {row.name for row in results.recipe.methods}
    merges = [row for row in summarise(data.scores, "validation").sets if row.method in rows]
    if not merges:
        # Without a grid nothing is scored on validation data; the first method is published
        # rather than one picked by looking at test scores.
        names = [row.name for row in results.recipe.methods]
        return (results.sets[0].label, names[0], False) if names else None
    best = max(merges, key=lambda row: row.mean if row.mean is not None else float("-inf"))
    return best.expert_set, best.method, best.tuned


def _publish_adapter(
    results: PipelineResults, data: ReportData, label: str, method: str, tuned: bool, target: Path
) -> Path:
    one = next(s for s in results.sets if s.label == label)
    row = next(r for r in results.recipe.methods if r.name == method)
    name = one.chosen[method] if tuned else "default"
    variant = next(v for v in variants(row) if v.name == name)
    scores = [
        r
        for r in data.scores
        if (r.expert_set, r.method, r.tuned, r.split) == (label, method, tuned, "test")
    ]
    key = sha256_of([VERSION, one.merged[method, name].report, [r.score for r in scores]])
    if is_done(target, key):
        return target
    files = one.files(row.tasks)
    evidence = one.evidence(row)
    merged = merge(files, **order_of(variant, evidence, results.recipe.seed))
    write_merged(
        merged,
        target,
        key=key,
        inputs={file.name: str(file.path) for file in files},
        seconds=float(one.merged[method, name].run.get("seconds", 0.0)),
        base=results.base_path,
        scores=scores,
        evidence=evidence,
    )
    return target


def _command() -> str:
    """Return the command line that repeats this run, as a user would type it."""
    program = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = program.name if program else Path(sys.argv[0]).name
    words = [json.dumps(w) if " " in w else w for w in sys.argv[1:]]
    return " ".join(["python -m", name, *words])
