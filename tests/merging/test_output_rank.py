"""The last step of a merge: rank policies, what a cut keeps, and what the report says of it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import icm_ray
from icm_ray import RecipeError
from icm_ray.adapters import verify_written
from icm_ray.linalg.lowrank import norm
from icm_ray.merging.cut import SERVING_RANKS, RankRule, cut, serving_rank
from icm_ray.types import Delta, LoRAFactors, MergeReport, ModuleReport

SHAPES = {"m": (20, 30), "n": (9, 12)}


@pytest.fixture
def four(make_adapter):
    """Four adapters of rank 3: the exact sum has rank 12, or 9 in the module of nine rows."""
    return [make_adapter(name, shapes=SHAPES, rank=3) for name in "abcd"]


def exact_sum(adapters, module: str, weight: float = 1.0) -> torch.Tensor:
    products = [f.b.double() @ f.a.double() for f in (x.modules[module] for x in adapters)]
    return weight * sum(products)


def ranks(result) -> dict[str, int]:
    return {module: factors.rank for module, factors in result.adapter.modules.items()}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, {"m": 12, "n": 9}),
        ("exact", {"m": 12, "n": 9}),
        (5, {"m": 5, "n": 5}),
        (1, {"m": 1, "n": 1}),
        (100, {"m": 12, "n": 12}),
        ("energy:1", {"m": 12, "n": 9}),
        ("serving:1", {"m": 1, "n": 1}),
        ("serving:10", {"m": 8, "n": 8}),
        ("serving:64", {"m": 12, "n": 9}),
    ],
)
def test_policies_give_their_ranks(four, policy, expected) -> None:
    result = icm_ray.merge(four, "task_arithmetic", output_rank=policy)
    assert ranks(result) == expected
    for module, report in result.report.modules.items():
        factors = result.adapter.modules[module]
        assert report.rank == factors.rank
        full = exact_sum(four, module)
        s = torch.linalg.svdvals(full)
        kept = float(s[: report.rank].square().sum() / s.square().sum())
        assert report.retained_energy == pytest.approx(min(kept, 1.0), abs=1e-9)
        error = float((factors.delta().double() - full).norm() / full.norm())
        assert error == pytest.approx(report.truncation_error, abs=2e-6)
        assert report.truncation_error == pytest.approx((1 - report.retained_energy) ** 0.5)
        assert report.output_norm == pytest.approx(float(factors.delta().double().norm()), rel=1e-6)
        assert report.exact_rank in (12, 9)


def test_each_method_has_its_own_default(four) -> None:
    assert ranks(icm_ray.merge(four, "svd")) == {"m": 3, "n": 3}
    assert ranks(icm_ray.merge(four, "soup")) == {"m": 12, "n": 9}
    assert ranks(icm_ray.merge(four, "svd", output_rank="exact")) == {"m": 12, "n": 9}


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999])
def test_energy_is_the_smallest_rank_that_keeps_the_share(four, share: float) -> None:
    result = icm_ray.merge(four, "soup", output_rank=f"energy:{share}")
    for module, factors in result.adapter.modules.items():
        energy = torch.linalg.svdvals(exact_sum(four, module)).square().cumsum(0)
        enough = int((energy >= share * energy[-1]).nonzero()[0]) + 1
        assert factors.rank == enough
        assert result.report.modules[module].retained_energy >= share


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_is_the_dense_truncation(four, rank: int) -> None:
    result = icm_ray.merge(four, "svd", params={"weights": [0.5, -1.0, 2.0, 0.1]}, output_rank=rank)
    for module, factors in result.adapter.modules.items():
        products = (x.modules[module].b.double() @ x.modules[module].a.double() for x in four)
        full = sum(w * p for w, p in zip((0.5, -1.0, 2.0, 0.1), products, strict=True))
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert float((factors.delta() - best).norm() / best.norm()) < 1e-6


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 10), st.integers(1, 10))
def test_cut_never_exceeds_the_policy_and_is_exact_where_it_fits(d_out, d_in, rank, limit) -> None:
    draw = torch.Generator().manual_seed(rank)
    factors = LoRAFactors(
        torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw)
    )
    done = cut(factors, RankRule("at most", limit))
    assert done.factors.rank <= limit
    if rank <= limit:
        assert done.factors is factors
    dense = Delta.of(factors.delta())
    again = cut(dense, RankRule("at most", limit))  # the same from a dense result
    torch.testing.assert_close(again.factors.delta(), done.factors.delta(), rtol=1e-4, atol=1e-4)
    assert again.factors.rank <= min(limit, d_out, d_in)


@pytest.mark.parametrize(
    "policy",
    [
        *(0, -1, True, "", "8", "exactly", "energy", "energy:", "energy:0", "energy:1.1"),
        *("energy:x", "energy:nan", "serving:0", "serving:-8", "serving:x", "serving:8.5"),
    ],
)
def test_policies_that_mean_nothing_are_refused(policy) -> None:
    with pytest.raises(RecipeError, match=r"output\.rank: .* but a positive int"):
        RankRule.parse(policy, "exact", 8)


@pytest.mark.parametrize(("ranks", "needed"), [([], 1), ([3], 8), ([8, 9], 16), ([600], 600)])
def test_servers_start_with_fixed_ranks(ranks: list[int], needed: int) -> None:
    assert serving_rank(ranks) == needed
    assert list(SERVING_RANKS) == sorted(SERVING_RANKS)


def test_the_whole_adapters_energy_weighs_modules_by_their_norm() -> None:
    def module(norm: float, energy: float) -> ModuleReport:
        return ModuleReport(1, 2, {"a": 1.0}, norm, energy, (1 - energy) ** 0.5)

    modules = {"m": module(3.0, 0.9), "n": module(1.0, 0.5), "z": module(0.0, 1.0)}
    report = MergeReport("svd", "", {}, 0, 1, {"a": "x"}, modules)
    assert report.retained_energy == pytest.approx(10 / (9 / 0.9 + 1 / 0.5))


def test_input_norms_are_those_of_the_deltas(four) -> None:
    report = icm_ray.merge(four, "soup").report.modules["m"]
    for adapter in four:
        factors = adapter.modules["m"]
        assert report.input_norms[adapter.name] == pytest.approx(norm(factors.b, factors.a))


def test_one_budget_keeps_the_largest_singular_values_of_all_modules(four, tmp_path) -> None:
    result = icm_ray.merge(four, "task_arithmetic", output_rank="total:9")
    spectra = {module: torch.linalg.svdvals(exact_sum(four, module)) for module in SHAPES}
    ninth = torch.cat(list(spectra.values())).sort(descending=True).values[8]
    assert ranks(result) == {m: int((s >= ninth * (1 - 1e-6)).sum()) for m, s in spectra.items()}
    assert sum(ranks(result).values()) == 9
    for module, factors in result.adapter.modules.items():
        alone = icm_ray.merge(four, "task_arithmetic", output_rank=factors.rank)
        torch.testing.assert_close(factors.delta(), alone.adapter.modules[module].delta())
        one, other = (r.report.modules[module] for r in (result, alone))
        assert one.retained_energy == pytest.approx(other.retained_energy, abs=1e-6)
        assert one.output_norm == pytest.approx(other.output_norm, rel=1e-6)
    icm_ray.save_adapter(result.adapter, tmp_path / "cut")
    assert verify_written(tmp_path / "cut", result.adapter)["max_relative_error"] < 1e-5
    config = json.loads((tmp_path / "cut/adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"]


@pytest.mark.parametrize("method", ["ties", "emr", "iso_c"])
def test_a_budget_holds_for_any_method_and_any_task_s_own_adapter(four, method) -> None:
    result = icm_ray.merge(four, method, output_rank="total:7", params={"restore_norm": True})
    for adapter in (result.adapter, *result.per_task.values()):
        assert sum(f.rank for f in adapter.modules.values()) == 7
        assert min(f.rank for f in adapter.modules.values()) >= 1
    for report in result.report.modules.values():
        mean = sum(report.input_norms.values()) / 4
        assert report.output_norm == pytest.approx(mean, rel=1e-4)
        assert 0 < report.retained_energy < 1


def test_a_budget_that_holds_everything_takes_nothing(four) -> None:
    result = icm_ray.merge(four, "soup", output_rank="total:1000")
    assert ranks(result) == {"m": 12, "n": 9}
    assert result.report.retained_energy == pytest.approx(1.0, abs=1e-9)


def test_a_budget_below_one_rank_a_module_is_refused(four) -> None:
    with pytest.raises(RecipeError, match="total:1' but 2 modules keep a rank each"):
        icm_ray.merge(four, "soup", output_rank="total:1")
