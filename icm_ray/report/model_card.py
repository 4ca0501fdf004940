"""The README.md that lies beside a merged adapter."""

import json
import re
from collections.abc import Mapping, Sequence

from icm_ray.report.data import ScoreRow, is_reference
from icm_ray.report.text import markdown, number, percent
from icm_ray.report.usage import FOLDER, Usage, how_to_load
from icm_ray.types import MergeReport


def model_card(
    report: MergeReport,
    adapter_names: Sequence[str],
    base_model: str | None,
    scores: Sequence[ScoreRow] = (),
    usage: Usage | None = None,
) -> str:
    """Return the model card of a merged adapter as Markdown.

    Args:
        report: What the merge did.
        adapter_names: The merged adapters.
        base_model: Hub id of the base, or a local path, of which only the last name is shown.
        scores: Scores of this adapter; test scores are preferred to validation scores.
        usage: The classes it is loaded onto; bare models by default.
    """
    parts = [
        _front_matter(base_model),
        f"# {markdown(report.method)} merge of {len(adapter_names)} LoRA adapters\n",
        _summary(report, adapter_names, base_model),
        _inputs(report, adapter_names),
        _settings(report),
        _scores(scores),
        how_to_load(usage or Usage(), base_model if _is_hub_id(base_model) else None),
        _reproduce(),
    ]
    return "\n".join(part for part in parts if part)


def _is_hub_id(base_model: str | None) -> bool:
    """Tell "name" or "owner/name" from a path, which means nothing on another machine."""
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", base_model or "", flags=re.ASCII))


def _front_matter(base_model: str | None) -> str:
    lines = ["---"]
    if base_model and _is_hub_id(base_model):
        # Quoted, or YAML would read an id such as 1e5 as a number.
        lines.append(f"base_model: {json.dumps(base_model)}")
        lines.append("base_model_relation: adapter")
    lines += ["library_name: peft", "tags:", "- lora", "- merge", "---\n"]
    return "\n".join(lines)


def _summary(report: MergeReport, names: Sequence[str], base_model: str | None) -> str:
    shown = (base_model or "").replace("\\", "/").rstrip("/")
    base = shown if _is_hub_id(base_model) else shown.rpartition("/")[2]
    of_base = f" of {markdown(base)}" if base else ""
    listed = ", ".join(markdown(name) for name in names)
    return (
        f"One PEFT LoRA adapter{of_base} that stands for several: {listed}. icm_ray merged them "
        "without further training of the base model.\n\n"
        f"Formula: {markdown(report.formula)}\n"
    )


def _inputs(report: MergeReport, names: Sequence[str]) -> str:
    rows = {name: report.inputs.get(name, "") for name in names}
    return _table("Inputs", ("adapter", "fingerprint (sha256)"), rows)


def _settings(report: MergeReport) -> str:
    ranks = sorted({module.rank for module in report.modules.values()})
    rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
    rows = {
        "method": report.method,
        **{f"parameter {name}": _value(value) for name, value in report.params.items()},
        "seed": str(report.seed),
        "output rank asked for": str(report.output_rank or "the method's default"),
        "rank": f"{rank} in {len(report.modules)} modules",
        "retained energy": f"{percent(report.retained_energy)} of the squared norm before the cut",
    }
    if report.seen_energy is not None:
        rows["as inputs see it"] = f"{percent(report.seen_energy)} of the squared norm of outputs"
    if report.evidence:
        rows["evidence (sha256)"] = report.evidence
    return _table("Settings", ("what", "value"), rows)


def _table(title: str, head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {markdown(name)} | {markdown(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines, ""])


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _scores(scores: Sequence[ScoreRow]) -> str:
    merged = [row for row in scores if not is_reference(row.method)]
    rows = [row for row in merged if row.split == "test"] or merged
    if not rows:
        return ""
    lines = [
        f"| {markdown(row.task)} | {markdown(row.metric)} | {number(row.score)} "
        f"| {number(row.low)} to {number(row.high)} | {percent(row.normalised)} "
        f"| {percent(row.gain_kept)} |"
        for row in sorted(rows, key=lambda row: (row.task, row.expert_set, row.method))
    ]
    head = "| task | metric | score | 95 % interval | of the expert's score | of its gain kept |"
    rule = "| --- | --- | ---: | ---: | ---: | ---: |"
    return "\n".join([f"## Scores on the {rows[0].split} split\n", head, rule, *lines, ""])


def _reproduce() -> str:
    return f"""## Reproduce

`merge_report.json` holds every parameter and the hash of every input. This rebuilds the adapter
from its inputs and compares the bytes:

```
icm-ray reproduce {FOLDER}
```
"""
