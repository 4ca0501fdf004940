"""One static page that needs nothing but itself: no scripts, no fonts, no links to load."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from icm_ray.report.data import ReportData, ScoreRow, Split
from icm_ray.report.findings import ExpertCheck, check_experts, headline
from icm_ray.report.summary import Summary, init_of, summarise
from icm_ray.report.text import is_number, number, percent, plain


@dataclass(frozen=True)
class Picture:
    """One picture of the page: SVG text, with a heading and a sentence on how to read it."""

    heading: str
    caption: str
    svg: str


def page(data: ReportData) -> str:
    """Return the whole report as HTML."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Markup is our own output; every other text may hold a stranger's name.
        finalize=lambda v: plain(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
    )
    environment.filters.update(number=number, percent=percent, shade=_shade)
    test, validation = summarise(data.scores, "test"), summarise(data.scores, "validation")
    # Validation stands in front only as long as nothing was tested.
    main: Split = "test" if test.sets or not validation.sets else "validation"
    summary = test if main == "test" else validation
    return environment.get_template("template.html").render(
        data=data,
        main=main,
        summary=summary,
        folded=validation if main == "test" else None,
        headlines=[h for init in summary.inits if (h := headline(summary, init))],
        checks=_by_set(check_experts(data.scores, main, data.expert_gains)),
        pictures=[(p, Markup(p.svg)) for p in _pictures(data, summary)],
    )


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
        if methods:
            yield Picture(
                f"Scores by method and task: {init}",
                "A dot is one expert set, its bar the 95 % interval; upright lines are means over "
                "expert sets. Methods go from best to worst mean. Arrows and lines at -0.25, the "
                "left edge, stand for anything lower.",
                pictures.score_picture(rows, methods),
            )
    if any(data.ratios.values()):
        yield Picture(
            "Null-space ratios",
            "Share of a module's input that the adapter's A maps to nothing, for each task. High "
            "means the adapter reads little of what reaches it; hatched: no adapter there.",
            pictures.ratio_picture(data.ratios),
        )
    matrices = {"task vectors": data.task_vector_cosines, "deltas": data.delta_cosines}
    if matrices := {title: table for title, table in matrices.items() if any(table.values())}:
        yield Picture(
            "Cosines between tasks",
            "Task vectors are mean changes of the hidden state, deltas are changes of the weights. "
            "Near 0: the tasks do not touch. Negative: they pull against each other.",
            pictures.cosine_picture(matrices),
        )
    if any(data.retained_energy.values()):
        yield Picture(
            "Retained energy",
            "Share of each module's squared norm that the final cut to the output rank kept.",
            pictures.module_picture("energy", data.retained_energy, (0.0, 1.0)),
        )
    if any(data.output_norms.values()):
        yield Picture(
            "Size of the merged change",
            "Frobenius norm of each module's merged delta.",
            pictures.module_picture("norms", data.output_norms),
        )
