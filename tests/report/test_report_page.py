import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from icm_ray.report import ReportData, console_table, markdown_table, pictures, write_report
from icm_ray.report.html import page

FILES = ("index.html", "results.json", "results.parquet", "table.md")

EVIL = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Counts opened and closed tags."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.closed: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)

    def handle_endtag(self, tag):
        self.closed.append(tag)


def test_same_input_same_bytes_in_any_order(data, tmp_path):
    write_report(data, tmp_path / "a")
    write_report(replace(data, scores=data.scores[::-1]), tmp_path / "b")

    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_parquet_holds_every_score(data, tmp_path, make_row, make_scores):
    scores = [*make_scores(), make_row("nan", "topic", 0.5, gain_kept=math.nan, spearman=0.3)]
    write_report(replace(data, scores=scores), tmp_path)
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()

    assert len(rows) == len(scores)
    assert next(row for row in rows if row["method"] == "nan")["gain_kept"] is None
    assert all(asdict(score) in rows for score in scores[:-1])


def test_json_is_sorted_and_without_nan(data, tmp_path, make_row, make_scores):
    scores = [*make_scores(), make_row("nan", "topic", math.nan, normalised=None)]
    write_report(replace(data, scores=scores), tmp_path)
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)

    assert text == json.dumps(found, indent=2, sort_keys=True) + "\n"
    best = found["summary"]["test"]["inits"][0]
    assert best["method"] == "soup"
    assert best["mean"]["mean"] == pytest.approx(0.7125)
    assert "seconds" not in text


def test_page_has_each_method_task_hash_and_note_and_loads_nothing(data):
    text = page(data)

    for word in ("soup", "ties", "topic", "year", "hash of topic", "ab12", "Mind the gap."):
        assert word in text, word
    assert data.command in text
    assert text.count("<svg") == 4
    for word in ("<script", "<link", "src=", "@import", "url(http"):
        assert word not in text, word
    tags = Tags()
    tags.feed(text)
    for tag in ("table", "tr", "td", "th", "details", "figure", "svg", "p", "tbody"):
        assert tags.opened.count(tag) == tags.closed.count(tag), tag


def test_page_says_what_happened(data):
    text = " ".join(page(data).split())

    assert "<b>soup</b> is best on average: 71.2 %" in text
    assert re.search(r"28\.[78] points below the experts", text)
    assert "<b>soup</b> loses least: it keeps 42.5 %" in text
    assert "2 of 4 experts beat the refitted linear probe" in text


@pytest.mark.parametrize(
    "name", [EVIL, "a\x1b[31m\x00b", "$x_{1$", "\u202eevil", "名前", "a" * 200]
)
def test_a_strange_name_is_text_everywhere(name, tmp_path, make_row, make_data):
    scores = [make_row(m, name, s) for m, s in (("expert", 0.8), ("soup", 0.6), (name, 0.5))]
    table = {name: {name: 0.5}}
    data = make_data(
        title=name,
        scores=scores,
        tasks={name: {"source": name}},
        ratios={name: {name: (0.1, 0.2)}},
        task_vector_cosines=table,
        retained_energy=table,
        notes=[name],
    )
    write_report(data, tmp_path)
    text = (tmp_path / "index.html").read_text()

    assert "<script" not in text
    assert not set("\x1b\x00\u202e") & set(text + (tmp_path / "table.md").read_text())
    for svg in text.split("<svg")[1:]:
        ET.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")


def test_an_empty_run_still_makes_a_page():
    empty = ReportData(title="Nothing", command="x", base={}, tasks={}, scores=[])

    assert "No merge has been scored yet." in page(empty)
    assert "<svg" not in page(empty)
    assert markdown_table(empty) == ""


def test_page_claims_no_interference_where_there_is_none(make_data, make_row):
    rows = [make_row("expert", "topic", 0.8), make_row("soup", "topic", 0.82)]
    text = " ".join(page(make_data(scores=rows)).split())

    assert "On average soup is no worse than the experts, and 0 of its 1 scores" in text
    assert "Interference" not in text
    assert "experts beat the refitted" not in text, "nothing to say without a probe"


def test_validation_is_folded_away_and_stands_in_until_there_is_a_test(data):
    validation = [replace(row, split="validation") for row in data.scores]

    both = page(replace(data, scores=[*data.scores, *validation]))
    assert "<summary><b>Validation scores</b>" in both
    assert "Scores (validation)" in page(replace(data, scores=validation))


def test_pictures_are_xml_take_the_page_colour_and_show_gaps():
    svg = pictures.ratio_picture({"a": {"l.0.q": (0.1, 0.2)}, "b": {"l.1.q": (0.1, 0.3)}})
    root = ET.fromstring(svg)

    assert "0.q" in "".join(root.itertext())
    assert "currentColor" in svg
    assert "pattern" in svg, "a missing module is hatched"
    assert svg == pictures.ratio_picture({"b": {"l.1.q": (0.1, 0.3)}, "a": {"l.0.q": (0.1, 0.2)}})


def test_many_modules_are_thinned_to_labels_that_fit():
    table = {"soup": {f"model.layers.{i}.q_proj": 0.5 for i in range(200)}}
    svg = pictures.module_picture("energy", table)

    assert 20 < svg.count("q_proj") <= 2 * pictures.MAX_COLUMN_LABELS


def test_a_score_below_the_floor_is_an_arrow_at_the_edge(make_row):
    rows = [make_row("expert", "a", 0.8), make_row("base", "a", -900.0), make_row("soup", "a", -7)]

    assert "900" not in pictures.score_picture(rows, ["soup"])


def test_console_table_shows_the_tuned_row_and_fits_one_screen(data):
    tuned = [replace(row, tuned=True) for row in data.scores if row.method == "ties"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(replace(data, scores=[*data.scores, *tuned])))
    text = console.export_text()

    assert text.count("ties") == 1
    assert "*" in next(line for line in text.splitlines() if "ties" in line)
    assert "71.2" in next(line for line in text.splitlines() if "soup" in line)


def test_markdown_table_has_a_range_and_the_worst_task(data):
    text = markdown_table(data)

    assert re.search(r"\| method \| gain kept \| mean \| worst task \|", text)
    assert re.search(
        r"\| soup \| .* \| 71.2 % \[68.8..73.8\] \| 65.0 % \[62.5..67.5\] \(year\) \|", text
    )
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_import_is_light():
    code = "import sys, icm_ray.report.html; print({'jinja2', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout.strip() == "set()"


def test_inputs_that_tasks_share_are_shown_and_said(data):
    assert "inputs: topic shares" not in page(data)
    cosines = {"topic": {"topic": 1.0, "year": 0.77}, "year": {"topic": 0.77, "year": 1.0}}
    shown = page(replace(data, input_cosines=cosines, input_lines=["inputs: topic shares. <b>"]))
    assert "inputs: topic shares. &lt;b&gt;" in shown
    assert "0.77" in shown or ".77" in shown
