"""The benchmark's answers at a tiny size; never its times."""

import math

import pytest

from icm_ray.config import BenchmarkRecipe
from icm_ray.distributed import benchmark
from icm_ray.distributed.benchmark_memory import PeakMemory, random_adapter
from icm_ray.recipe_files import load_recipe

LAYERS = {"q_proj": [64, 48], "v_proj": [16, 48]}


def tiny(**changes):
    values = {"layers": LAYERS, "adapters": 3, "rank": 4, "repeats": 2, "output": "unused"}
    return BenchmarkRecipe.model_validate({**values, **changes})


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Measure in this process: a fresh one imports for seconds, which only memory needs."""
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda function, *args: function(*args))


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_every_side_gives_the_true_merge(method):
    rows = benchmark.compare(tiny(), method)
    assert [row.side for row in rows] == [benchmark.OURS, benchmark.ALONE, benchmark.PEFT]
    assert all(row.error < 1e-6 for row in rows[:2])
    assert rows[2].error < 1e-4  # PEFT's dense float32 SVD
    assert rows[2].ratio == 1
    assert all(math.isfinite(row.ratio) and row.ratio > 0 for row in rows)


def test_calls_are_counted_per_side():
    rows = benchmark.compare(tiny(repeats=3, peft_repeats={"svd": 1}), "svd")
    assert [len(row.cpu_seconds) for row in rows] == [3, 3, 1]


def test_the_error_is_that_of_the_dense_products():
    adapters = [random_adapter(LAYERS, name, 4, 0) for name in ("one", "two")]
    truth = benchmark.true_merge("cat", adapters, 4)["q_proj"]
    mean = sum(adapter.modules["q_proj"].delta().double() for adapter in adapters) / 2
    assert ((truth[0] @ truth[1] - mean).norm() / mean.norm()).item() < 1e-6
    wrong = (1.25 * truth[0], truth[1])
    assert benchmark.relative_error(wrong, truth) == pytest.approx(0.25, rel=1e-12)


def test_the_tables_are_printed_and_written(tmp_path, capsys):
    found = benchmark.run_benchmark(tiny(methods=["cat"], whole_model=2), tmp_path / "out")
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert "| cat | merge |" in text
    assert "4 modules" in text
    assert "PEFT" in capsys.readouterr().out
    assert found["scores"]["whole_model"]["bytes_read"] > 0


def test_peak_memory_sees_what_is_freed_again():
    with PeakMemory() as peak:
        bytearray(b"x" * 50_000_000)
    if peak.extra_bytes is not None:  # elsewhere than on Linux nobody tells
        assert peak.extra_bytes > 40_000_000


@pytest.mark.parametrize("name", ["peft", "many"])
def test_shipped_recipes_load(name):
    assert load_recipe(BenchmarkRecipe, f"configs/benchmark/{name}.yaml").output
