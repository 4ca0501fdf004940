"""From pipeline results to the report's plain values, and the one adapter a run recommends."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from icm_ray.adapters import delta_cosines
from icm_ray.distributed.probes import read_probe
from icm_ray.errors import counted
from icm_ray.evaluation.metrics import Score, difference_interval, score
from icm_ray.evaluation.scoring import TaskScore, standing
from icm_ray.evidence.overlap import overlap_lines
from icm_ray.evidence.store import load_evidence
from icm_ray.evidence.tensors import DESCRIPTION
from icm_ray.files import cost_of, is_done, read_json, sha256_of, whole_folder
from icm_ray.kinds import REALIGNED
from icm_ray.merging.folder import MergedFolder, Origin, write_merged
from icm_ray.merging.merge import merge_as_asked
from icm_ray.report import (
    BASE,
    EXPERT,
    PROBE,
    ReportData,
    ScoreRow,
    choice_lines,
    console_table,
    write_report,
)
from icm_ray.report.data import OF_TASKS
from icm_ray.suites import BASES
from icm_ray.workflows.pipeline.choice import best_row, choice_of
from icm_ray.workflows.pipeline.learned_report import learned_report
from icm_ray.workflows.pipeline.rows import HEADS
from icm_ray.workflows.pipeline.table import SetResults, Table, Variant

VERSION = 1

NOTES = (
    "A score is normalised by the task's own expert: 1 is as good as the expert. Gain kept is the "
    "share of the expert's gain over the frozen base with the same head.",
    "Settings marked as tuned were chosen on validation data; the test split scores only what "
    "was chosen, and the default setting of each method.",
    f"Rows that end in {OF_TASKS} score each task with an adapter of its own that the method makes "
    "besides the common one; they answer an easier question and are no winners of this page.",
    f"Rows that end in {REALIGNED} read through heads whose outputs were fitted to the experts' "
    "answers to unlabelled inputs, and so does the base's row beside them: they say nothing of the "
    "adapter alone, and are no winners of this page. Their heads are in heads/.",
    "Intervals cover the sampling of test examples. The spread over expert sets is shown apart.",
)


def report_data(table: Table) -> ReportData:
    """Collect everything the page shows."""
    rows = [row for one in table.sets for row in _rows(table, one)]
    first = table.sets[0]
    assert first.evidence is not None, "gathered before"
    vectors, ratios = load_evidence(first.evidence)
    overlap = read_json(first.grams / DESCRIPTION)["overlap"] if first.grams else {}
    default = {row: m for (row, variant), m in first.merged.items() if variant == "default"}
    return ReportData(
        title=f"{table.name}: {counted(len(first.experts), 'task')}, "
        f"{counted(len(table.sets), 'set')} of experts",
        command=_command(),
        base=_base(table),
        tasks=_tasks(table),
        scores=rows,
        ratios={
            task: {m: (ratios.base[task][m], value) for m, value in modules.items()}
            for task, modules in ratios.expert.items()
        },
        task_vector_cosines=_cosines(vectors.vectors),
        delta_cosines=delta_cosines(first.files()),
        input_cosines=overlap,
        input_lines=overlap_lines(overlap),
        retained_energy={
            row: {m: r["retained_energy"] for m, r in merged.report["modules"].items()}
            for row, merged in default.items()
        },
        expert_gains={one.label: _expert_gains(table, one) for one in table.sets},
        **learned_report(table),
        choice=choice_of(table, rows) if table.validates_all else None,
        notes=(*table.gone.notes, *NOTES),
    )


def publish(table: Table, data: ReportData) -> dict[str, str]:
    """Write the report, and beside it the best merged adapter with its scores on its card."""
    with whole_folder(table.root / "report") as folder:
        write_report(data, folder)
    outputs = {"report": str(table.root / "report" / "index.html")}
    best = best_row(table, data.scores)
    if best is not None:
        outputs["adapter"] = str(_publish_adapter(table, data, *best))
        one, variant, _ = best
        heads = table.root / HEADS / one.label / variant.row.name / variant.name
        outputs |= {"heads": str(heads)} if heads.is_dir() else {}
    return outputs


def probe_scores(table: Table) -> dict[str, TaskScore]:
    """Return the linear probe's test scores by task."""
    scores = {}
    for task, folder in table.probes.items():
        _, predictions = read_probe(folder)
        examples = table.suite.load(task, "test", table.recipe.sizes.test)
        item = score(table.suite.tasks[task], predictions, examples.targets)
        scores[task] = TaskScore(item, predictions)
    return scores


def console(data: ReportData) -> None:
    """Print the table of test scores, and what is recommended."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(console_table(data))
    for line in choice_lines(data.choice) if data.choice else ():
        print(line)


def _rows(table: Table, one: SetResults) -> list[ScoreRow]:
    rows = [
        row
        for (name, variant, split), scores in one.scores.items()
        for row in _score_rows(table, one, name, variant, split, scores)
    ]
    probes = probe_scores(table)
    return rows + _score_rows(table, one, PROBE, "default", "test", probes) if probes else rows


def _score_rows(
    table: Table,
    one: SetResults,
    name: str,
    variant: str,
    split: str,
    scores: dict[str, TaskScore],
) -> list[ScoreRow]:
    references = (one.scores[who, "default", split] for who in (EXPERT, BASE))
    where = standing(scores, *references)
    label = name.removesuffix(OF_TASKS).removesuffix(REALIGNED)
    merged = one.merged.get((label, variant))
    ranks = [m["rank"] for m in merged.report["modules"].values()] if merged else [0]
    # The default setting can be the best one, and then stands in both rows.
    shown = [False] * (variant == "default") + [True] * (
        one.chosen.get(name.removesuffix(REALIGNED)) == variant
    )
    lora = table.recipe.lora.rank if name == EXPERT else 0
    row_of = {row.name: row for row in table.rows}.get(label)
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
            normalised=_number(where.normalised.get(task, math.nan)),
            gain_kept=_number(where.gain_kept.get(task, math.nan)),
            seconds=_seconds(one, label, merged),
            seen=task in (one.experts if merged_tasks is None else merged_tasks),
        )

    return [row(task, item.score, tuned) for tuned in shown for task, item in scores.items()]


def _seconds(one: SetResults, name: str, merged: MergedFolder | None) -> float:
    """Return what a merge took, learning included."""
    return cost_of(one.made_for(name)) + (merged.run.get("seconds", 0.0) if merged else 0.0)


def _expert_gains(table: Table, one: SetResults) -> dict[str, tuple[float, float]]:
    """Return paired intervals of expert minus probe, or minus the base for tasks without a head.

    Both answered the same examples.
    """
    below = {**one.scores[BASE, "default", "test"], **probe_scores(table)}
    return {
        task: difference_interval(
            table.suite.tasks[task],
            expert.predictions,
            below[task].predictions,
            table.suite.load(task, "test", table.recipe.sizes.test).targets,
        )
        for task, expert in one.scores[EXPERT, "default", "test"].items()
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _tasks(table: Table) -> dict[str, dict[str, str | int]]:
    size = table.recipe.sizes.test
    reads = sum(
        1 for s in table.sets for _ in (table.root / "scores" / f"{s.label}-test").glob("*")
    )
    return {
        name: {
            "kind": task.kind,
            "metric": task.metric,
            "classes": len(task.classes),
            "source": task.source,
            "licence": task.licence,
            "test_examples": size or table.suite.count(name, "test"),
            "test_hash": table.suite.split_hash(name, "test", size),
            "test_reads": reads,
        }
        for name, task in table.suite.tasks.items()
        if name in table.sets[0].scored
    }


def _base(table: Table) -> dict[str, str]:
    spec = str(table.recipe.base)
    known = BASES.get(spec)
    return {
        "name": known.hub_id if known else spec,
        "fingerprint": table.session.shared.fingerprint,
        "licence": known.licence if known else "see the model's own card",
        "note": known.note if known else "",
    }


def _cosines(vectors: Any) -> dict[str, dict[str, float]]:
    unit = {task: v.double() / v.double().norm().clamp(min=1e-12) for task, v in vectors.items()}
    return {t: {o: float(unit[t] @ unit[o]) for o in sorted(unit)} for t in sorted(unit)}


def _publish_adapter(
    table: Table, data: ReportData, one: SetResults, variant: Variant, tuned: bool
) -> Path:
    """Merge the best row once more, with its test scores on the model card."""
    target, row = table.root / "adapter", variant.row
    shown = (one.label, row.name, tuned, "test")
    scores = [r for r in data.scores if (r.expert_set, r.method, r.tuned, r.split) == shown]
    merged = one.merged[row.name, variant.name]
    key = sha256_of([VERSION, merged.report, [r.score for r in scores]])
    if is_done(target, key):
        return target
    files, request = one.files(row.tasks), table.request(one, variant)
    seconds = float(merged.run.get("seconds", 0.0))
    origin = Origin.keeping(files, key, seconds, one.evidence_for(row))
    write_merged(
        merge_as_asked(files, request),
        target,
        replace(origin, evicted=table.gone.from_row(row.name)),
        base=table.session.base,
        scores=scores,
    )
    return target


def _command() -> str:
    """Return the command line that repeats this run, as a user would type it."""
    program = getattr(sys.modules.get("__main__"), "__spec__", None)
    called = ["python -m", program.name] if program else [Path(sys.argv[0]).name]
    words = [json.dumps(w) if " " in w else w for w in sys.argv[1:]]
    return " ".join([*called, *words])
