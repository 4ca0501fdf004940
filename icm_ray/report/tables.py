"""The numbers as files and tables: Parquet and JSON, Markdown, and the terminal."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from icm_ray.files import write_json
from icm_ray.report.choice import choice_lines
from icm_ray.report.data import SPLITS, ReportData, ScoreRow, Split
from icm_ray.report.summary import InitSummary, SetSummary, Spread, Summary, summarise
from icm_ray.report.text import clip, is_number, markdown, number, percent, plain


def write_parquet(scores: Sequence[ScoreRow], path: Path) -> None:
    """Write every score in long format, sorted, NaN as null. `seconds` differs between runs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"tuned": pa.bool_(), "rank": pa.int64()}
    texts = ("expert_set", "method", "params", "task", "split", "metric")
    kinds |= dict.fromkeys(texts, pa.string())
    schema = pa.schema([(f.name, kinds.get(f.name, pa.float64())) for f in fields(ScoreRow)])
    in_order = sorted(scores, key=lambda r: (r.expert_set, r.method, r.tuned, r.task, r.split))
    rows = [_without_nan(asdict(row)) for row in in_order]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_summary(data: ReportData, path: Path) -> None:
    """Write the summary of every split as sorted JSON without NaN and without clock times."""
    content = {
        "title": data.title,
        "command": data.command,
        "base": dict(data.base),
        "tasks": {name: dict(facts) for name, facts in data.tasks.items()},
        **({"choice": asdict(data.choice)} if data.choice else {}),
        "notes": list(data.notes),
        "summary": {split: _summary_json(summarise(data.scores, split)) for split in SPLITS},
    }
    write_json(path, _without_nan(content))


def markdown_table(data: ReportData, split: Split = "test") -> str:
    """Return one Markdown table per init, best method first, references last."""
    summary = summarise(data.scores, split)
    header = ["method", "gain kept", "mean", "worst task", "rank corr."]
    header += map(markdown, summary.tasks)
    parts = []
    for init in summary.inits:
        merges, references = summary.of_init(init), summary.of_init(init, references=True)
        lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
        lines += [_markdown_cells(row, summary.tasks) for row in merges + references]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        names = sorted({one.expert_set for row in merges + references for one in row.sets})
        parts.append(f"{split}, experts: {markdown(', '.join(names))}\n\n{table}\n")
    if data.choice:
        parts.append("".join(f"- {markdown(line)}\n" for line in choice_lines(data.choice)))
    return "\n".join(parts)


def console_table(data: ReportData, split: Split = "test") -> RichTable:
    """Return one screen: methods by mean normalised score, then experts, probe and base.

    A method that was tuned shows only its tuned row; the page and the files have all. Seconds are
    shown here alone: two runs with the same scores write the same page, and no two take as long.
    """
    summary = summarise(data.scores, split)
    title = Text(f"{plain(data.title)} ({split})")
    caption = (
        "* tuned. Kept: % of the experts' gain over the base; mean, worst: % of their scores; "
        "corr: mean rank correlation of the regressions; s: merging (wall) and learning (CPU)."
    )
    table = RichTable(title=title, caption=caption, box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True, min_width=12)
    table.add_column("", width=1)
    for name in ("kept", "mean", "worst", "corr", "s"):
        table.add_column(name, justify="right", no_wrap=True, min_width=4)
    for task in summary.tasks:
        table.add_column(Text(clip(task, 16)), justify="right", overflow="fold", min_width=5)
    for init in summary.inits:
        if len(summary.inits) > 1:
            table.add_row(Text(f"[{plain(init)}]", style="bold"))
        merges = summary.of_init(init)
        tuned = {row.method for row in merges if row.tuned}
        for row in merges:
            if row.tuned or row.method not in tuned:
                table.add_row(*_console_cells(row, summary.tasks))
        table.add_row()
        for row in summary.of_init(init, references=True):
            table.add_row(*_console_cells(row, summary.tasks), style="dim")
        table.add_row()
    return table


def _console_cells(row: InitSummary, tasks: Sequence[str]) -> list[Text]:
    shares = [spread and 100 * spread.mean for spread in (row.mean_kept, row.mean, row.worst)]
    scores = [spread and spread.mean for spread in map(row.scores.get, tasks)]
    cells = [number(share, 1) for share in shares]
    cells.append(number(row.correlation and row.correlation.mean, 2))
    cells.append("" if row.is_reference else number(row.seconds, 0))
    cells += [number(score, 2) for score in scores]
    return [Text(clip(row.method)), Text("*" * row.tuned), *map(Text, cells)]


def _markdown_cells(row: InitSummary, tasks: Sequence[str]) -> list[str]:
    worst = _share_range(row.worst) + (f" ({markdown(row.worst_task)})" if row.worst_task else "")
    shares = [_share_range(row.mean_kept), _share_range(row.mean), worst]
    scores = [number(spread and spread.mean) for spread in map(row.scores.get, tasks)]
    correlation = number(row.correlation and row.correlation.mean)
    return [markdown(row.label), *shares, correlation, *scores]


def _share_range(spread: Spread | None) -> str:
    if spread is None or spread.low == spread.high:
        return percent(spread and spread.mean)
    return f"{percent(spread.mean)} [{100 * spread.low:.1f}..{100 * spread.high:.1f}]"


def _summary_json(summary: Summary) -> dict[str, Any]:
    return {
        "expert_sets": [_set_json(one) for one in summary.sets],
        "inits": [
            {**asdict(row), "sets": [one.expert_set for one in row.sets]} for row in summary.across
        ],
    }


def _set_json(one: SetSummary) -> dict[str, Any]:
    found = asdict(one)
    rows = found.pop("rows")
    scores = {task: row["score"] for task, row in rows.items()}
    return {**found, "params": one.params, "rank": one.rank, "scores": scores}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not is_number(value) else value
