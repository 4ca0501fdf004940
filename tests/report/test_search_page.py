"""The page, the pictures and the tables of a search."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icm_ray.files import read_json
from icm_ray.report.search_data import Objective, SearchData, TrialRow
from icm_ray.report.search_page import trials_table, write_search

HIGHER = Objective("validation_mean", "higher is better", "mean score")
LOWER = Objective("output_rank", "lower is better", "rank")


def trial(number, state="complete", mean=0.5, rank=8.0, **point):
    point = {"method": "ties", "ties.params.density": 0.1 * number, **point}
    known = {} if state == "failed" else {"validation_mean": mean, "output_rank": rank}
    error = "validation_mean: no finite number <b>" if state == "failed" else ""
    return TrialRow(number, state, "sampler", "ties", point, known, {}, "node", 1.5, error)


@pytest.fixture
def data():
    trials = [
        trial(0),
        trial(1, mean=0.9, rank=16.0),
        trial(2, "failed"),
        trial(3, "stopped", mean=0.2, method="svd"),
        trial(4, mean=0.4, rank=4.0, rank_choice=True),
    ]
    return SearchData(
        title="Search: <any>",
        command="python -m jobs.search",
        objectives=[HIGHER, LOWER],
        trials=trials,
        best=1,
        recipe="method: ties",
        front=[0, 1, 4],
        importance={"ties.params.density": 0.75, "method": 0.25},
        standing={"test": {"mean": 0.8, "worst": 0.6, "normalised": {"a": 0.8}}},
    )


def test_the_page_tells_what_won_what_failed_and_shows_the_front(data, tmp_path):
    write_search(data, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 3
    assert "Trial 1" in page
    assert "Search: &lt;any&gt;" in page
    assert "no finite number &lt;b&gt;" in page
    assert "80.0 % of the experts' scores" in page
    assert "src=" not in page
    assert {p.name for p in tmp_path.glob("*.svg")} == {
        "front.svg",
        "history.svg",
        "importance.svg",
    }
    with Image.open(tmp_path / "front.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == (0xD5, 0x5E, 0x00)).all(1).sum() > 3 * 20  # three dots, and the legend's
    assert (pixels[0] == 255).all()


def test_one_objective_has_no_front_to_show(data, tmp_path):
    write_search(replace(data, objectives=[HIGHER], front=[]), tmp_path)
    assert not list(tmp_path.glob("front.*"))


def test_the_same_search_gives_the_same_page(data, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_search(data, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_every_trial_is_a_row_and_every_value_a_column(data, tmp_path):
    write_search(data, tmp_path)
    rows = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["number"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[3]["point.method"] == "svd"
    assert rows[1]["point.ties.params.density"] == pytest.approx(0.1)
    assert rows[4]["point.rank_choice"] == "True"
    assert rows[2]["metrics.validation_mean"] is None
    assert read_json(tmp_path / "search.json")["best"]["number"] == 1


def test_the_table_ranks_the_front_or_the_ten_best(data):
    numbers = [line.split("|")[1].strip() for line in trials_table(data).splitlines()[2:]]
    assert numbers == ["1", "0", "4"]
    alone = replace(data, objectives=[LOWER, HIGHER], front=[])
    numbers = [line.split("|")[1].strip() for line in trials_table(alone).splitlines()[2:]]
    assert numbers == ["4", "0", "1"]
