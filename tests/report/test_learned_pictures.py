import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from icm_ray.report import Gap, LearnedRow, learned_page
from icm_ray.report.data import TrainingCurve
from icm_ray.report.html import page
from icm_ray.report.pictures import logarithmic, svg

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def learned(data):
    modules = list(data.ratios["topic"])
    shares = {"topic": dict.fromkeys(modules, 0.3), "year": {modules[0]: 0.5}}
    history = {"topic": [1.0, 0.5, 0.01], "year": [0.9, 0.8, 0.7]}
    return LearnedRow(
        method="soup", history=history, shares=shares, unmoved=["x"], warnings={"year": EVIL}
    )


def test_a_page_of_its_own_is_the_same_bytes_and_escapes(learned):
    text = learned_page(learned)
    assert text == learned_page(learned)
    assert EVIL not in text
    assert "No target depends on 1" in text
    ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])


def test_the_report_shows_all_that_was_learned(learned, make_data):
    ratios = {t: dict.fromkeys(learned.shares["topic"], 0.4) for t in ("topic", "year")}
    data = make_data(
        learned=[learned],
        state_ratios={"base": ratios, "expert": ratios, "soup": ratios},
        quartiles={"expert": {"topic": [0.9, 0.8, 0.8, 0.7]}, "soup": {"topic": [0.5] * 4}},
        curves={
            name: TrainingCurve(
                kind=kind,
                steps=[0, 3, 6],
                ratios=[0.9, 0.91, 0.8],
                losses=[math.nan, 2.0, 1.0],
                scores=[0.1, 0.5, 0.6],
            )
            for name, kind in (("topic", "classification"), ("year", "regression"))
        },
        gaps=[
            Gap(
                init="shared",
                method="soup",
                baseline="ties",
                difference=d,
                low=d - 0.02,
                high=d + 0.02,
            )
            for d in (0.05, 0.0, -0.05)
        ],
    )
    text = page(data)
    assert text == page(data)
    for word in (
        "before and after merging",
        "Accuracy by null-space ratio",
        "Fine-tuning: null-space ratio, loss and score",
        "What soup learned",
        "✓ better",
        "within the interval",
        "✗ worse",
    ):
        assert word in text, word
    assert text.count("<svg") == 8


def test_tasks_without_classes_have_no_accuracy_by_ratio(learned, make_data):
    text = page(make_data(learned=[learned], quartiles={"expert": {}, "soup": {}}))
    assert "What soup learned" in text
    assert "Accuracy by null-space ratio" not in text


def test_rows_that_merged_some_experts_have_a_table(make_data, make_row, make_scores):
    half = [make_row("half", "topic", 0.72), make_row("half", "year", 0.4, seen=False)]
    text = page(make_data(scores=[*make_scores(), *half]))
    table = text[text.index("Seen and unseen tasks") :]
    assert table.index("90.0 %") < table.index("50.0 %")


@pytest.mark.parametrize("values", [(0.003, 0.6), (0.21, 0.68)])
def test_logarithmic_axes_have_plain_numbers(values):
    def draw(figure):
        axes = figure.subplots()
        axes.plot(range(2), values)
        logarithmic(axes, "y")

    text = svg("log", 2.0, draw)
    assert "mathdefault" not in text
    assert "$" not in text
    assert "0.1" in text or "2e-01" in text or "0.2" in text


def test_what_holds_no_expert_s_share_has_its_losses_alone(learned):
    text = learned_page(replace(learned, shares={"topic": {}, "year": {}}))
    assert "No share of any expert" in text
    assert "Coefficient of each expert" not in text
    ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
