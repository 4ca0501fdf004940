"""Curves over numbers of experts and inputs."""

from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icm_ray.report.curves import FLOOR, curves_of, main
from icm_ray.report.data import ScoreRow


def score(method, task, kept, *, tuned=False, seen=True):
    return ScoreRow(
        expert_set="shared-seed0",
        method=method,
        tuned=tuned,
        params="",
        rank=8,
        task=task,
        split="test",
        metric="accuracy",
        score=0.5,
        low=0.4,
        high=0.6,
        normalised=0.9,
        gain_kept=kept,
        seconds=1.0,
        seen=seen,
    )


def table(count):
    tasks = [f"task {i}" for i in range(count)]
    rows = [score("soup", task, 1 / count) for task in tasks]
    rows += [score("ties", task, -1.0) for task in tasks]
    rows += [score("ties", task, 0.5, tuned=True) for task in tasks]
    return [*rows, score("expert", "task 0", 1.0), score("soup", "unseen", -9.0, seen=False)]


def test_a_curve_leaves_out_what_was_not_merged_and_shows_what_was_tuned():
    curves = curves_of({4: table(4), 2: table(2)})
    assert curves == {"soup": [(2, 0.5), (4, 0.25)], "ties": [(2, 0.5), (4, 0.5)]}


@pytest.mark.parametrize("worst", [0.2, 20 * FLOOR])
def test_the_picture_is_drawn_from_tables(tmp_path, worst):
    for name, rows in {"k2": table(2), "k4": table(4), "few": [score("nsc", "a", worst)]}.items():
        pq.write_table(pa.Table.from_pylist([asdict(r) for r in rows]), tmp_path / name)
    picture = tmp_path / "curves.png"
    tables = [f"2={tmp_path / 'k2'}", f"4={tmp_path / 'k4'}"]
    inputs = [f"16={tmp_path / 'few'}", f"64={tmp_path / 'few'}"]
    assert main([str(picture), "--experts", *tables, "--inputs", *inputs]) == 0
    with Image.open(picture) as image:
        assert image.width > 1000
