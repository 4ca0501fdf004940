"""The benchmark's answers at a tiny size; never its times."""

import math
from pathlib import Path

import pytest
import torch

from icm_ray import METHODS, RecipeError
from icm_ray.benchmarks import (
    command,
)
from icm_ray.benchmarks import (
    judging as benchmark_judging,
)
from icm_ray.benchmarks import (
    peers as benchmark_peers,
)
from icm_ray.benchmarks import (
    run as benchmark,
)
from icm_ray.benchmarks.comparisons import COMPARISONS, NAIVE, PEFT
from icm_ray.benchmarks.fusion import SIDES, measure_fusion
from icm_ray.benchmarks.memory import PeakMemory, random_adapter
from icm_ray.benchmarks.tables import as_markdown, as_tables
from icm_ray.config import BenchmarkRecipe, CommandBenchmark, FusionBenchmark
from icm_ray.config.loading import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs/benchmark"
LAYERS = {"q_proj": [64, 48], "v_proj": [16, 48]}
# What both sides' results may differ by, where that is judged.
TOLERANCE = {"truth": 1e-4, "peer": 1e-4, "residual": 1e-4}


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
    assert [row.side for row in rows] == [benchmark.OURS, benchmark.ALONE, PEFT]
    assert all(row.error < 1e-6 for row in rows[:2])
    assert rows[2].error < 1e-4  # PEFT's dense float32 SVD
    assert rows[2].ratio == 1
    assert all(math.isfinite(row.ratio) and row.ratio > 0 for row in rows)


@pytest.mark.parametrize("name", COMPARISONS)
def test_both_sides_of_every_comparison_agree(name):
    comparison = COMPARISONS[name]
    rows = benchmark.compare(tiny(repeats=1), name)
    assert rows[-1].side == comparison.peer
    for row in rows[:-1]:
        if comparison.judged == "noise":
            assert row.error == pytest.approx(1, rel=0.1)
        else:
            assert -1e-6 < row.error < TOLERANCE[comparison.judged]
    assert (rows[-1].error is None) == (
        comparison.judged == "peer" or (comparison.judged == "residual" and "dare" in name)
    )


def test_calls_are_counted_per_side():
    rows = benchmark.compare(tiny(repeats=3, peft_repeats={"svd": 1}), "svd")
    assert [len(row.cpu_seconds) for row in rows] == [3, 3, 1]


def test_the_error_is_that_of_the_dense_products():
    adapters = [random_adapter(LAYERS, name, 4, 0) for name in ("one", "two")]
    truth = benchmark_judging.true_merge(adapters, None)["q_proj"]
    mean = sum(adapter.modules["q_proj"].delta().double() for adapter in adapters) / 2
    assert ((truth[0] @ truth[1] - mean).norm() / mean.norm()).item() < 1e-6
    wrong = (1.25 * truth[0], truth[1])
    assert benchmark_judging.distance(wrong, truth) == pytest.approx(0.25, rel=1e-12)
    dense = benchmark_judging.as_matrix(wrong)
    assert benchmark_judging.distance(dense, truth) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("judged", ["truth", "peer", "residual", "noise"])
def test_a_wrong_result_is_seen(judged):
    name = {"truth": "svd", "peer": "ties_dense", "residual": "ties_svd", "noise": "dare_dense"}
    comparison = COMPARISONS[name[judged]]
    adapters = [random_adapter(LAYERS, f"task{k}", 4, 0) for k in range(3)]
    layers = {n: [adapter.modules[n] for adapter in adapters] for n in LAYERS}
    right = comparison.make(layers, 4, {}).call()
    wrong = {n: 1.5 * benchmark_judging.as_matrix(one) for n, one in right.items()}
    whole = benchmark_peers.peft_function("ties", layers, 4, {}).call
    results = {"wrong": wrong, comparison.peer: right}
    errors = benchmark_judging.judge(comparison, adapters, 4, whole, results)
    least = {"truth": 0.49, "peer": 0.49, "residual": 0.02, "noise": 1.2}
    assert errors["wrong"] > least[judged]
    if judged != "peer":
        assert errors[comparison.peer] < {"noise": 1.1}.get(judged, 1e-4)


def test_the_smallest_residual_is_that_of_the_svd():
    draw = torch.Generator().manual_seed(0)
    for shape in ((9, 5), (5, 9)):
        dense = torch.randn(*shape, generator=draw, dtype=torch.float64)
        s = torch.linalg.svdvals(dense)
        expected = float(s[2:].norm() / s.norm())
        assert benchmark_judging._best_residual(dense, 2) == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def toy():
    """Two adapters of rank one on a 2 x 2 layer, small enough to merge by hand."""
    from icm_ray.types import LoRAFactors

    one = LoRAFactors(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0], [0.0]]))
    two = LoRAFactors(torch.tensor([[-1.0, 2.0]]), torch.tensor([[1.0], [1.0]]))
    return [one, two]


def test_naive_merges_of_the_toy_are_those_done_by_hand(toy):
    deltas = torch.stack([one.delta() for one in toy])
    found = benchmark_peers.ties(deltas, 0.5)  # entries equal to the last one kept stay
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.5], [-1.0, 2.0]]))
    expected = torch.tensor([[1.3066, 2.0063], [-2.0719, 2.2304]])
    torch.testing.assert_close(benchmark_peers.tsv(toy, {}), expected, atol=1e-4, rtol=0)
    grams = {"gram.task0": torch.diag(torch.tensor([2.0, 1.0])), "gram.task1": torch.eye(2)}
    expected = torch.tensor([[1.0, 1.5], [-1 / 3, 1.0]], dtype=torch.float64)
    found = benchmark_peers.regmean(toy, grams)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_naive_lego_of_the_toy(toy):
    found = benchmark_peers.lora_lego(toy, {"init_idx": torch.tensor([0])})
    a, b = torch.tensor([0.5, 1.5]), torch.tensor([1.0, 0.5])
    lengths = (6.0**0.5 + 7.0**0.5) / 2
    factor = (lengths / torch.cat([a, b]).norm()) ** 2
    torch.testing.assert_close(found, factor * torch.outer(b, a))


def test_naive_merges_read_only_their_own_layers_evidence():
    seen = {}

    def merge(factors, evidence):
        seen[len(seen)] = dict(evidence)
        return factors[0].delta()

    adapter = random_adapter({"a": [4, 4], "b": [4, 4]}, "x", 2, 0)
    layers = {n: [f] for n, f in adapter.modules.items()}
    evidence = {"a.gram.task0": torch.ones(1), "b.gram.task0": torch.zeros(1)}
    benchmark_peers.naive(merge, layers, 2, evidence).call()
    assert [list(found) for found in seen.values()] == [["gram.task0"]] * 2
    assert [float(found["gram.task0"]) for found in seen.values()] == [1, 0]


def test_the_tables_are_printed_and_written(tmp_path, capsys):
    found = benchmark.run(tiny(methods=["cat"], whole_model=2), tmp_path / "out")
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert "| cat | merge |" in text
    assert ">= 10x (P8)" in text
    assert "(P10)" in text
    assert "4 modules" in text
    assert "PEFT" in capsys.readouterr().out
    assert found["scores"]["whole_model"]["bytes_read"] > 0


COMMAND = {"label": "tiny", "layers": LAYERS, "copies": 2, "repeats": 1, "goal": "<= 2.5x"}


def test_a_command_s_parts_are_measured_by_themselves(monkeypatch):
    monkeypatch.setattr(command, "_spent", lambda words: (3.0, 4.0))
    how = CommandBenchmark.model_validate(COMMAND)
    row = command.whole_command(how, tiny(adapters=2))
    assert tuple(row.stages) == command.STAGES
    assert list(row.least) == ["reading", "arithmetic", "writing"]
    assert min(*row.stages.values(), *row.least.values()) > 0
    text = as_markdown(as_tables(tiny(), [], None, [], commands=[row]))
    assert "| tiny | svd | 0.0 | 4.0 | 3.0 |" in text
    assert "| 3.0 | 3.0 | <= 2.5x |" in text


@pytest.mark.slow
def test_commands_are_those_of_a_user(tmp_path):
    recipe = tiny(methods=[], commands=[{**COMMAND, "method": "ties", "alone": False}])
    (row,) = benchmark.run(recipe, tmp_path / "out")["scores"]["commands"]
    assert row["cpu"] > row["start"] > 0
    assert row["plan"] > row["start"]
    assert row["stages"] == {}
    assert "| tiny | ties |" in (tmp_path / "out" / "benchmark.md").read_text()


def test_every_problem_of_a_recipe_is_told_at_once(tmp_path, monkeypatch):
    rows = {name: row for name, row in METHODS.items() if name != "svd"}
    monkeypatch.setattr(benchmark, "METHODS", rows)
    recipe = tiny(methods=["cat", "svd", "ctu", "knots_ties_q"], layers={"v_proj": [16, 48]})
    with pytest.raises(RecipeError) as caught:
        benchmark.run(recipe, tmp_path / "out")
    told = caught.value.problems
    assert "'ctu' is not compared" in told[0]
    assert "Did you mean 'cat'?" in told[0] or "one of" in told[0]
    assert told[1].startswith("methods: svd")
    assert "layers: q_proj missing but knots_ties_q" in told[2]
    assert not (tmp_path / "out").exists()


def test_naive_peers_are_called_so():
    naive = [row for row in COMPARISONS.values() if row.peer == NAIVE]
    assert {row.method for row in naive} == {
        *("knots_ties", "core_space", "lora_lego", "tsv", "regmean"),
    }
    assert all(row.make.func is benchmark_peers.naive for row in naive)


def test_peak_memory_sees_what_is_freed_again():
    with PeakMemory() as peak:
        bytearray(b"x" * 50_000_000)
    if peak.extra_bytes is not None:  # elsewhere than on Linux nobody tells
        assert peak.extra_bytes > 40_000_000


def test_a_fusion_vae_s_parameters_do_not_grow_with_the_adapter():
    layers = {"q_proj": [24, 32], "v_proj": [16, 32]}
    sizes = [
        FusionBenchmark(label=str(copies), layers=layers, copies=copies, rank=4, repeats=1)
        for copies in (2, 8)
    ]
    rows = [measure_fusion(how, preset, 0) for how in sizes for preset in SIDES]
    assert [row.numbers for row in rows] == [832] * 3 + [3328] * 3
    assert [row.size for row in rows] == [2 * 48, 832, 832, 8 * 48, 3328, 3328]
    assert rows[0].parameters == rows[3].parameters
    assert all(row.seconds > 0 for row in rows)
    text = as_markdown(as_tables(tiny(), [], None, [], [], rows))
    assert "| 8 | default | 3,328 | 384 |" in text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    recipe = load_recipe(BenchmarkRecipe, path)
    assert recipe.output
    assert set(recipe.methods) <= set(COMPARISONS)
