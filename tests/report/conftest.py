"""A small run: two expert sets, two tasks, two merges, and the references."""

import pytest

from icm_ray.report import ReportData, ScoreRow


def make_row(method: str, task: str, score: float, **changes) -> ScoreRow:
    """Return a score whose expert has 0.8 and whose base has 0.4."""
    values = {
        "expert_set": "shared-seed0",
        "tuned": False,
        "params": "scale=0.3",
        "rank": 4,
        "split": "test",
        "metric": "accuracy",
        "low": score - 0.02,
        "high": score + 0.02,
        "normalised": score / 0.8,
        "gain_kept": (score - 0.4) / 0.4,
        "seconds": 1.0,
    }
    return ScoreRow(method=method, task=task, score=score, **(values | changes))


def make_scores() -> list[ScoreRow]:
    """Return soup, ties and the references on two tasks and two seeds."""
    scores = {"soup": (0.6, 0.5), "ties": (0.7, 0.44), "expert": (0.8, 0.8)}
    scores |= {"probe": (0.7, 0.79), "base": (0.4, 0.4)}
    return [
        make_row(method, task, score + 0.04 * seed * (method == "soup"), expert_set=name)
        for seed, name in enumerate(("shared-seed0", "shared-seed1"))
        for method, pair in scores.items()
        for task, score in zip(("topic", "year"), pair, strict=True)
    ]


def make_data(**changes) -> ReportData:
    """Return a whole run with every picture."""
    modules = [f"encoder.layer.{i}.attention.self.{part}" for i in (2, 10) for part in "qv"]
    per_module = {m: dict.fromkeys(modules, 0.9) for m in ("soup", "ties")}
    values = {
        "title": "A run",
        "command": "python -m jobs.pipeline -c run.yaml",
        "base": {"name": "owner/base", "fingerprint": "ab12", "licence": "MIT", "note": "Small."},
        "tasks": {
            task: {"kind": "classification", "test_hash": f"hash of {task}", "test_reads": 1}
            for task in ("topic", "year")
        },
        "scores": make_scores(),
        "ratios": {t: dict.fromkeys(modules, (0.5, 0.6)) for t in ("topic", "year")},
        "task_vector_cosines": {"topic": {"topic": 1.0, "year": 0.25}, "year": {"year": 1.0}},
        "delta_cosines": {"topic": {"topic": 1.0}, "year": {"year": 1.0}},
        "retained_energy": per_module,
        "notes": ["Mind the gap."],
    }
    return ReportData(**(values | changes))


@pytest.fixture
def data() -> ReportData:
    """A whole run."""
    return make_data()


@pytest.fixture(name="make_row")
def _make_row():
    return make_row


@pytest.fixture(name="make_scores")
def _make_scores():
    return make_scores


@pytest.fixture(name="make_data")
def _make_data():
    return make_data
