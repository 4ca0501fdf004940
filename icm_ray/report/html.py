"""One static page that needs nothing but itself: no scripts, no fonts, no links to load."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icm_ray.report.choice import choice_lines
from icm_ray.report.data import BASE, EXPERT, REFERENCES, LearnedRow, ReportData, ScoreRow, Split
from icm_ray.report.findings import ExpertCheck, check_experts, headline
from icm_ray.report.summary import Summary, init_of, summarise
from icm_ray.report.text import is_number, number, percent, plain

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).parent
METHODS_SHOWN = 16
"""Rows of one picture; more are hard to tell apart."""
WHOLE = 1 - 1e-6


@dataclass(frozen=True)
class Picture:
    """One picture of the page: SVG text, with a heading and a sentence on how to read it.

    A folded one is opened by a click.
    """

    heading: str
    caption: str
    svg: str
    folded: bool = False


def page(data: ReportData) -> str:
    """Return the whole report as HTML."""
    from markupsafe import Markup

    templates = environment()
    templates.filters.update(shade=_shade)
    test, validation = summarise(data.scores, "test"), summarise(data.scores, "validation")
    # Validation stands in front only as long as nothing was tested.
    main: Split = "test" if test.sets or not validation.sets else "validation"
    summary = test if main == "test" else validation
    return templates.get_template("template.html").render(
        data=data,
        choice=choice_lines(data.choice) if data.choice else [],
        main=main,
        summary=summary,
        folded=validation if main == "test" else None,
        headlines=[h for init in summary.inits if (h := headline(summary, init))],
        checks=_by_set(check_experts(data.scores, main, data.expert_gains)),
        partial=[row for row in summary.across if row.mean_unseen],
        pictures=[(p, Markup(p.svg)) for p in _pictures(data, summary)],
    )


def environment() -> "jinja2.Environment":
    """Return the templates of this folder, with every text but our own markup made safe."""
    import jinja2
    from markupsafe import Markup

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Markup is our own output; every other text may hold a stranger's name.
        finalize=lambda v: plain(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
    )
    found.filters.update(number=number, percent=percent)
    return found


def style() -> str:
    """Return the style of the results page, so that all pages look alike."""
    found = re.search(
        r"<style>.*?</style>", (FOLDER / "template.html").read_text("utf-8"), re.DOTALL
    )
    assert found
    return found[0]


def _shade(row: ScoreRow) -> int:
    """Return how strongly to shade a score: 0 at half the expert's score or less, 100 at all."""
    share = row.normalised if is_number(row.normalised) else 0.0
    return round(100 * min(1.0, max(0.0, 2 * share - 1)))


def _by_set(checks: list[ExpertCheck]) -> dict[str, list[ExpertCheck]]:
    groups: dict[str, list[ExpertCheck]] = {}
    for check in checks:
        groups.setdefault(check.expert_set, []).append(check)
    return groups


def _pictures(data: ReportData, summary: Summary) -> Iterator[Picture]:
    from icm_ray.report import pictures

    for init in summary.inits:
        methods = list(dict.fromkeys(row.method for row in summary.of_init(init)))
        rows = [r for s in summary.sets if init_of(s.expert_set) == init for r in s.rows.values()]
        for first in range(0, len(methods), METHODS_SHOWN):
            part = methods[first : first + METHODS_SHOWN]
            which = (
                f", places {first + 1} to {first + len(part)}" if len(part) < len(methods) else ""
            )
            yield Picture(
                f"Scores by method and task: {init}{which}",
                "A dot is one expert set, its bar the 95 % interval; upright lines are means over "
                "expert sets. Methods go from best to worst mean. Arrows and lines at -0.25, the "
                "left edge, stand for anything lower.",
                pictures.score_picture([r for r in rows if r.method in (*part, *REFERENCES)], part),
                folded=first > 0,
            )
    if any(data.ratios.values()):
        yield Picture(
            "Null-space ratios",
            "Share of a module's input that the adapter's A maps to nothing, for each task. High "
            "means the adapter reads little of what reaches it; hatched: no adapter there.",
            pictures.ratio_picture(data.ratios),
        )
    matrices = {
        "task vectors": data.task_vector_cosines,
        "deltas": data.delta_cosines,
        "inputs": data.input_cosines,
    }
    if matrices := {title: table for title, table in matrices.items() if any(table.values())}:
        yield Picture(
            "Cosines between tasks",
            "Task vectors are mean changes of the hidden state, deltas are changes of the weights, "
            "inputs the second moments of what the modules read, where those were gathered. "
            "Near 0: the tasks do not touch. Negative: they pull against each other."
            + "".join(f" {line}" for line in data.input_lines),
            pictures.cosine_picture(matrices),
        )
    cut = {m: e for m, e in data.retained_energy.items() if min(e.values(), default=1) < WHOLE}
    if cut:
        yield Picture(
            "Retained energy",
            "Share of each module's squared norm that the final cut to the output rank kept. Rows "
            "that are left out lost nothing.",
            pictures.module_picture("energy", cut, (0.0, 1.0)),
            folded=len(cut) > METHODS_SHOWN,
        )
    yield from learned_figures(data, summary)


def learned_figures(data: ReportData, summary: Summary) -> Iterator[Picture]:
    """Yield what was learned: ratios of merges, quartiles, and each row's shares and losses."""
    from icm_ray.report import learned_pictures

    ranked = list(dict.fromkeys(row.method for row in summary.across))
    learned = sorted(
        data.learned,
        key=lambda row: ranked.index(row.method) if row.method in ranked else len(ranked),
    )
    measured = [row.method for row in learned if row.method in data.state_ratios]
    best = measured[: learned_pictures.LINES_SHOWN]
    shown = {m: data.state_ratios[m] for m in (EXPERT, *best) if m in data.state_ratios}
    if shown and BASE in data.state_ratios:
        yield Picture(
            "Null-space ratios before and after merging",
            "On top the base's ratio, for each task and module it adapts; below the change with "
            "the expert's features and with those of the best learned merges. Below zero: the "
            "adapter reads more of what reaches it.",
            learned_pictures.change_picture(data.state_ratios[BASE], shown),
        )
    # A suite without classifications has rows without a line.
    lines = {m: data.quartiles[m] for m in (*REFERENCES, *best) if data.quartiles.get(m)}
    if lines:
        yield Picture(
            "Accuracy by null-space ratio",
            "Each classification's test inputs in four equal parts, from the lowest mean ratio "
            "under the model's own features to the highest; Figure 2 of arXiv 2603.26317.",
            learned_pictures.quartile_picture(lines),
        )
    if data.curves:
        yield Picture(
            "Fine-tuning: null-space ratio, loss and score",
            "Of each expert at the steps that were kept: the ratio on its own inputs, mean over "
            "modules; the loss of the step's batch; the validation score with the finished head. "
            "Figure 1 of arXiv 2603.26317; training.trajectory: whole keeps step 0 as well.",
            learned_pictures.training_picture(data.curves),
        )
    for place, row in enumerate(learned):
        yield learned_figure(row, folded=place > 0)


def learned_figure(row: LearnedRow, *, folded: bool = False) -> Picture:
    """Return the shares and losses of one learned merge."""
    from icm_ray.report import learned_pictures

    what = (
        "Norm of what the core holds in each expert's own row and column space, over the norm of "
        "the expert's change; a fixed start beneath the core is not in it"
        if row.core
        else "Coefficient of each expert in each module"
    )
    if not any(row.shares.values()):
        what = "No share of any expert: it was trained anew"
    facts = [f"{what}. Below: the loss of each step, with its running mean."]
    if row.unmoved:
        facts.append(f"No target depends on {len(row.unmoved)} of the learned parts.")
    facts += [f"{task}: {text}." for task, text in sorted(row.warnings.items())]
    return Picture(
        f"What {row.method} learned",
        " ".join(facts),
        learned_pictures.learned_picture(row),
        folded,
    )


def learned_page(row: LearnedRow) -> str:
    """Return a page of its own about one learned merge."""
    picture = learned_figure(row)
    heading, caption = html.escape(plain(picture.heading)), html.escape(plain(picture.caption))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{heading}</title>\n'
        "<style>:root { color-scheme: light dark } body { font-family: sans-serif; margin: 1.5rem "
        "auto; max-width: 70rem } svg { width: 100%; height: auto }</style>\n"
        f"<h1>{heading}</h1>\n<p>{caption}</p>\n{picture.svg}</html>\n"
    )
