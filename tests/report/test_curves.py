"""Curves over numbers of experts and inputs."""

from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icm_ray.report.curves import FLOOR, curves_of, gain_kept, main
from icm_ray.report.data import ScoreRow


def score(method, task, value, *, tuned=False, seen=True):
    return ScoreRow(
        expert_set="shared-seed0",
        method=method,
        tuned=tuned,
        params="",
        rank=8,
        task=task,
        split="test",
        metric="accuracy",
        score=value,
        low=value - 0.1,
        high=value + 0.1,
        normalised=0.9,
        gain_kept=None,
        seconds=1.0,
        seen=seen,
    )


def table(count):
    """Scores of tasks on which experts gain .4 over a base at .2, and of one without any gain."""
    tasks = [f"task {i}" for i in range(count)]
    rows = [score(m, t, v) for t in tasks for m, v in (("base", 0.2), ("expert", 0.6))]
    rows += [score(m, "none", 0.5) for m in ("base", "expert")]
    rows += [score("soup", task, 0.2 + 0.4 / count) for task in tasks]
    rows += [score("ties", task, 0.0) for task in tasks]
    rows += [score("ties", task, 0.4, tuned=True) for task in tasks]
    rows += [score("base", "unseen", 0.2), score("expert", "unseen", 0.4)]
    return [*rows, score("soup", "none", 0.1), score("soup", "unseen", 0.3, seen=False)]


def test_a_curve_leaves_out_what_was_not_merged_and_shows_what_was_tuned():
    curves = curves_of({4: table(4), 2: table(2)})
    assert curves["soup"] == [(2, pytest.approx(0.5)), (4, pytest.approx(0.25))]
    assert curves["ties"] == [(2, pytest.approx(0.5)), (4, pytest.approx(0.5))]


def test_the_gain_of_unseen_tasks_is_counted_apart():
    assert gain_kept(table(2), seen=False) == {("soup", False): pytest.approx(0.5)}
    assert gain_kept(table(2))["ties", False] == pytest.approx(-0.5)


@pytest.mark.parametrize("worst", [0.2, 20 * FLOOR])
def test_the_picture_is_drawn_from_tables(tmp_path, worst):
    few = [*table(2), score("nsc", "task 0", worst)]
    for name, rows in {"k2": table(2), "k4": table(4), "few": few}.items():
        pq.write_table(pa.Table.from_pylist([asdict(r) for r in rows]), tmp_path / name)
    picture = tmp_path / "curves.png"
    tables = [f"2={tmp_path / 'k2'}", f"4={tmp_path / 'k4'}"]
    inputs = [f"16={tmp_path / 'few'}", f"64={tmp_path / 'few'}"]
    assert main([str(picture), "--experts", *tables, "--inputs", *inputs]) == 0
    with Image.open(picture) as image:
        assert image.width > 1000
