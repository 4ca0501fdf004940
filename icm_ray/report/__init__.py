"""Result tables, pictures, one static HTML page, and the model card of a merged adapter.

data.py              the plain values the page of a pipeline is made from
summary.py           mean and worst task, per expert set and per init
choice.py            the merge that is recommended, in words
findings.py          who won, and whether the experts beat a linear probe
tables.py            Parquet, JSON, Markdown and terminal tables
html.py              the page of a pipeline or of a learned merge, from template.html
pictures.py          SVG pictures (imported only when a page is written: needs matplotlib)
learned_pictures.py  more of them, of what was learned
search_data.py       the plain values the page of a search is made from
search_page.py       that page, from search.html
search_pictures.py   its pictures
fusion_page.py       the page of a Fusion-VAE, from fusion.html
adapter_table.py     what inspect shows of adapters
method_table.py      the list of methods, and one method in full
model_card.py        README.md of a merged adapter
usage.py             its Python: how the adapter is loaded
text.py              numbers and names as they are shown
"""

from pathlib import Path

from icm_ray.report.choice import choice_lines
from icm_ray.report.data import (
    BASE,
    EXPERT,
    PROBE,
    Choice,
    Difference,
    Gap,
    LearnedRow,
    ReportData,
    ScoreRow,
)
from icm_ray.report.html import learned_page, page
from icm_ray.report.summary import Summary, summarise
from icm_ray.report.tables import console_table, markdown_table, write_parquet, write_summary

__all__ = [
    "BASE",
    "EXPERT",
    "PROBE",
    "Choice",
    "Difference",
    "Gap",
    "LearnedRow",
    "ReportData",
    "ScoreRow",
    "Summary",
    "choice_lines",
    "console_table",
    "learned_page",
    "markdown_table",
    "summarise",
    "write_report",
]


def write_report(data: ReportData, folder: Path) -> None:
    """Write index.html, results.json, results.parquet and table.md into `folder`.

    All but results.parquet, which holds the seconds, are the same bytes for the same scores. Call
    it inside `files.whole_folder` to have all of them or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page(data), encoding="utf-8")
    (folder / "table.md").write_text(markdown_table(data), encoding="utf-8")
    write_summary(data, folder / "results.json")
    write_parquet(data.scores, folder / "results.parquet")
