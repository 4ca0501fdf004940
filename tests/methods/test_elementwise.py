"""Element-wise methods beside plain dense code, written without blocks, passes or kernels."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from elementwise_samples import Experts, all_modules, combined, dense, merged, three_experts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import icm_ray
from icm_ray import METHODS
from icm_ray.linalg import blocks, kernels
from icm_ray.linalg.sparsify import largest, threshold
from icm_ray.methods.shared import trim
from icm_ray.methods.shared.blocks import deltas
from icm_ray.methods.shared.trim import of_module_alone, thresholds, trim_passes
from icm_ray.types import LoRAFactors, ModuleContext

three = pytest.fixture(three_experts, name="three")


def plain_ties(experts: Experts, density: float, weights: list[float]) -> dict[str, Tensor]:
    values, columns = dense(experts), torch.tensor(weights)[:, None, None]
    flat = torch.cat([v.flatten(1) for v in values.values()], dim=1)
    least = torch.tensor([threshold(row, density) for row in flat])[:, None, None]
    kept = {m: torch.where(v.abs() >= least, v, 0.0) * columns for m, v in values.items()}
    majority = int(sum(k.sum(0).sign().sum() for k in kept.values()).sign())
    ones = torch.ones_like(columns)
    return {m: combined(k, k.sum(0), majority, ones, "count") for m, k in kept.items()}


@st.composite
def adapters(draw) -> Experts:
    """Adapters of whole numbers, whose sums are exact: many equal, cancelling or zero entries."""
    shapes = {"m": (4, 3), "n": (2, 5), "o": (4, 3)}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    experts: dict[str, dict[str, LoRAFactors]] = {}
    for task in "abc"[: draw(st.integers(1, 3))]:
        rank = draw(st.integers(0, 3))
        modules = draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
        experts[task] = {
            m: LoRAFactors(
                torch.randint(-2, 3, (rank, shapes[m][1]), generator=generator).float(),
                torch.randint(-2, 3, (shapes[m][0], rank), generator=generator).float(),
            )
            for m in sorted(modules)
        }
    if len(experts) > 1 and draw(st.booleans()):  # the same adapter again, or its negative
        sign = draw(st.sampled_from([1.0, -1.0]))
        experts["b"] = {m: LoRAFactors(f.a, f.b * sign) for m, f in experts["a"].items()}
    return experts


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-5, atol=1e-6)


@given(adapters(), st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]), st.booleans())
def test_ties_is_plain_ties(experts: Experts, density: float, has_weights: bool) -> None:
    weights = [1.0, 0.5, -2.0][: len(experts)] if has_weights else [1.0] * len(experts)
    found = merged("ties", experts, density=density, weights=weights)
    assert_same(found, plain_ties(experts, density, weights))


@given(adapters(), st.sampled_from([0.3, 1.0]))
def test_core_is_ties_of_each_module_alone(experts: Experts, density: float) -> None:
    expected = {}
    for module in all_modules(experts):
        alone = {t: {m: f for m, f in experts[t].items() if m == module} for t in experts}
        expected |= plain_ties(alone, density, [1.0] * len(experts))
    assert_same(
        merged("ties", experts, density=density, preset="core"), dict(sorted(expected.items()))
    )


WEIGHTS = [0.5, 2.0, 1.5]


@pytest.mark.parametrize("preset", ["nsc", "peft_svd", "mergekit"])
@pytest.mark.parametrize("density", [0.01, 0.35, 1.0])
@pytest.mark.parametrize("aggregate", [None, "mean", "sum"])
def test_presets_of_ties_are_their_plain_rules(three, preset, density: float, aggregate) -> None:
    found = merged(
        "ties",
        three,
        density=density,
        preset=preset,
        weights=WEIGHTS,
        aggregate=aggregate,
        scale=2.0,
    )
    weights = torch.tensor(WEIGHTS)[:, None, None]
    for module, values in dense(three).items():
        size = values[0].numel()
        count = max(1, round(size * density)) if preset == "nsc" else int(size * density)
        kept = torch.where(torch.stack([largest(v, count) for v in values]), values, 0.0)
        if preset == "nsc":
            mean = "sum" if aggregate in (None, "sum") else "count"
            expected = combined(kept * weights, kept.sign().sum(0), 1, torch.ones(3, 1, 1), mean)
        elif preset == "peft_svd":
            mean = "sum" if aggregate == "sum" else "count"
            expected = combined(kept, kept.sum(0), 1, weights, mean)
        else:
            mean = "sum" if aggregate == "sum" else "weights"
            expected = combined(kept, (kept * weights).sum(0), 1, weights, mean)
        torch.testing.assert_close(found[module], 2 * expected)


@given(adapters(), st.sampled_from([0.1, 0.3, 0.6]), st.integers(1, 4))
def test_exact_trims_keep_the_first_of_equal_entries(experts: Experts, density, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "block_rows", lambda *_: rows)
        found = merged("magnitude_prune", experts, density=density)
    for module, values in dense(experts).items():
        count = int(density * values[0].numel())
        kept = torch.where(torch.stack([largest(v, count) for v in values]), values, 0.0)
        torch.testing.assert_close(found[module], kept.sum(0))


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.9])
def test_breadcrumbs_leave_out_both_ends(three, gamma: float) -> None:
    found = merged("breadcrumbs", three, density=0.4, gamma=gamma)
    for module, values in dense(three).items():
        size = values[0].numel()
        count = int(0.4 * size)
        start = min(int(gamma * size), size - count)
        expected = torch.zeros(values.shape[1:]).flatten()
        for v in values:
            order = v.abs().flatten().argsort(descending=True)[start : start + count]
            expected[order] += v.flatten()[order]
        torch.testing.assert_close(found[module].flatten(), expected)


NEUTRAL = [
    *(("ties", {"preset": p}) for p in ("ties", "core", "nsc", "peft", "peft_svd", "mergekit")),
    *(("dare", {"preset": p}) for p in ("dare", "peft")),
    *(("dare_ties", {"preset": p}) for p in ("dare_ties", "nsc", "peft", "peft_svd", "mergekit")),
    *(("magnitude_prune", {"preset": p}) for p in ("delta", "peft")),
    ("breadcrumbs", {}),
    ("della", {}),
]


@pytest.mark.parametrize(("method", "params"), NEUTRAL)
def test_one_adapter_that_keeps_everything_is_given_back(three, method: str, params: dict) -> None:
    one = {"a": three["a"]}
    found = merged(method, one, density=1.0, **params)
    assert_same(found, {m: f.delta() for m, f in one["a"].items()})


@pytest.mark.parametrize(("method", "params"), NEUTRAL)
def test_compiled_loops_change_no_bit(three, monkeypatch, method: str, params: dict) -> None:
    pytest.importorskip("numba")
    equal = {
        t: {m: LoRAFactors(f.a[:1], f.b[:, :1]) for m, f in x.items()} for t, x in three.items()
    }
    first = merged(method, equal, density=0.4, **params)
    monkeypatch.setattr(kernels, "compiled", lambda _loop: None)
    again = merged(method, equal, density=0.4, **params)
    for module, delta in first.items():
        assert torch.equal(delta.view(torch.int32), again[module].view(torch.int32))


def test_a_module_alone_has_its_own_statistics(three) -> None:
    factors = [three[task]["m"] for task in "abc"]
    context = ModuleContext("m", tuple("abc"), tuple("abc"))
    alone = of_module_alone(trim_passes(deltas, 0.3), factors, context)
    expected = torch.tensor([threshold(f.delta(), 0.3) for f in factors])
    torch.testing.assert_close(thresholds(alone), expected)


def guessed_and_swept(factors: list[LoRAFactors]) -> tuple[ModuleContext, ModuleContext]:
    context = ModuleContext("m", tuple("ab"), tuple("abc"))  # c lacks the module
    guessed = of_module_alone(trim_passes(deltas, 0.3, by_rows=True), factors, context)
    return guessed, of_module_alone(trim_passes(deltas, 0.3), factors, context)


@pytest.mark.parametrize("rows", [slice(0, None, 32), slice(1, None, 2)])
def test_a_threshold_is_exact_whatever_some_rows_say(rows: slice, monkeypatch) -> None:
    monkeypatch.setattr(trim, "LEAST_SAMPLE", 1)
    draw = torch.Generator().manual_seed(3)
    factors = [LoRAFactors(torch.randn(4, 50, generator=draw), torch.zeros(96, 4)) for _ in "ab"]
    for one in factors:
        one.b[rows] = torch.randn(one.b[rows].shape, generator=draw)
    guessed, swept = guessed_and_swept(factors)
    assert torch.equal(guessed.statistics["threshold"], swept.statistics["threshold"])
    assert {"start", "above"} <= guessed.statistics.keys(), "a wrong guess is followed by sweeps"


def test_a_right_guess_spares_a_sweep(monkeypatch) -> None:
    alike = [LoRAFactors(torch.randn(4, 4000), torch.ones(96, 4)) for _ in "ab"]
    guessed, _ = guessed_and_swept(alike)
    assert "start" not in guessed.statistics, "a small sample says too little"
    monkeypatch.setattr(trim, "LEAST_SAMPLE", 1)
    guessed, swept = guessed_and_swept(alike)
    assert torch.equal(guessed.statistics["threshold"], swept.statistics["threshold"])
    assert "above" not in guessed.statistics


def test_passes_are_only_for_what_looks_beyond_a_module(three) -> None:
    def number(method: str, **params: Any) -> int:
        row = METHODS[method]
        return len(row.passes(**row.bind(params, ["a"])))

    assert (number("ties"), number("ties", density=1.0), number("ties", preset="core")) == (6, 1, 0)
    assert (number("dare_ties"), number("dare_ties", trim_density=0.5)) == (1, 6)
    assert number("dare_ties", preset="nsc") == 0


def test_merging_streams_and_cuts(make_adapter) -> None:
    made = [make_adapter(name, shapes={"m": (30, 20)}, rank=2) for name in "ab"]
    result = icm_ray.merge(made, "ties", params={"density": 0.5})
    experts = {adapter.name: adapter.modules for adapter in made}
    best = torch.linalg.svd(merged("ties", experts, density=0.5)["m"])
    expected = best.U[:, :2] * best.S[:2] @ best.Vh[:2]
    assert result.report.modules["m"].rank == 2
    torch.testing.assert_close(result.adapter.modules["m"].delta(), expected, rtol=1e-4, atol=1e-5)
