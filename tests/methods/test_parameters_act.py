"""Parameters act as their methods say, on cases small enough to do by hand."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import icm_ray
from icm_ray.types import LoRAFactors


@pytest.fixture
def of_rows(adapter_around):
    """Adapters `a`, `b`, ... of one module whose deltas have one row each."""

    def make(*rows: Sequence[float]):
        return [
            adapter_around(name, {"m": LoRAFactors(torch.tensor([row]), torch.ones(1, 1))})
            for name, row in zip("abcd", rows, strict=False)
        ]

    return make


@pytest.fixture
def three(make_adapter):
    return [make_adapter(name, shapes={"m": (7, 9), "n": (5, 6)}, rank=2) for name in "abc"]


def delta(adapters, method: str, module: str = "m", **params) -> Tensor:
    result = icm_ray.merge(adapters, method, params=params, output_rank="exact")
    return result.adapter.modules[module].delta()


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize(
    ("preset", "elected"),
    [(None, -3.0), ("nsc", 3.0), ("peft_svd", 3.0), ("mergekit", 3.0)],
)
def test_where_tasks_cancel_the_majority_decides_or_plus(of_rows, method, preset, elected) -> None:
    two = of_rows([3.0, -1.0, -2.0], [-3.0, -1.0, -2.0])
    chosen = {} if preset is None else {"preset": preset}
    found = delta(two, method, density=1.0, **chosen)
    factor = 2.0 if preset == "nsc" or (method, preset) == ("dare_ties", "mergekit") else 1.0
    assert found.tolist() == [pytest.approx([elected, -factor, -2 * factor])]


def test_della_elects_plus_where_tasks_cancel(of_rows) -> None:
    found = delta(of_rows([3.0, -1.0], [-3.0, -1.0]), "della", density=1.0)
    assert found.tolist() == [pytest.approx([3.0, -1.0])]


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_signs_are_elected_by_values_or_by_their_number(of_rows, method) -> None:
    rows = [[5.0, 5.0, 5.0, 1.0], [-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, 0.0]]
    by_values, by_signs = (
        delta(of_rows(*rows), method, density=1.0, election=how) for how in ("values", "signs")
    )
    # The last entry cancels, and goes with most of the others.
    assert by_values.tolist() == [pytest.approx([5.0, 5.0, 5.0, 1.0])]
    assert by_signs.tolist() == [pytest.approx([-1.0, -1.0, -1.0, -1.0])]


@pytest.mark.parametrize("method", ["knots_ties", "knots_dare_ties", "ties", "dare_ties"])
def test_a_sum_counts_tasks_that_a_mean_does_not(three, adapter_around, method) -> None:
    same = [adapter_around(name, three[0].modules) for name in "abc"]
    own = three[0].modules["m"].delta()
    for aggregate, times in ((None, 1), ("mean", 1), ("sum", 3)):
        found = delta(same, method, density=1.0, aggregate=aggregate)
        torch.testing.assert_close(found, times * own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["knots_ties", "knots_dare_ties", "ties", "dare_ties"])
def test_a_task_of_no_weight_has_no_vote(three, method) -> None:
    found = delta(three, method, density=1.0, weights=[0.0, 2.0, 0.0])
    own = three[1].modules["m"].delta()
    torch.testing.assert_close(found, 2 * own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dares", "trims", "presets"),
    [
        ("dare_ties", "ties", ("dare_ties", "ties")),
        ("dare_ties", "ties", ("nsc", "nsc")),
        ("knots_dare_ties", "knots_ties", ("knots", "knots")),
        ("knots_dare_ties", "knots_ties", ("nsc", "nsc")),
    ],
)
def test_a_trim_beside_dare_is_that_of_ties(three, dares, trims, presets) -> None:
    everything = delta(three, dares, density=1.0, preset=presets[0])
    for module in ("m", "n"):
        own = {"density": 1.0, "trim_density": 0.3, "preset": presets[0]}
        found = delta(three, dares, module, **own)
        expected = delta(three, trims, module, density=0.3, preset=presets[1])
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(everything, delta(three, dares, **own))


def test_a_rounded_trim_keeps_one_entry_at_least(of_rows) -> None:
    one = of_rows([3.0, -5.0, 1.0])
    assert delta(one, "ties", density=1e-6, preset="nsc").tolist() == [[0.0, -5.0, 0.0]]
    assert not delta(one, "ties", density=1e-6, preset="peft_svd").any()


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_della_keeps_its_density_of_the_entries(make_adapter, density) -> None:
    (one,) = [make_adapter("a", shapes={"m": (60, 80)}, rank=3)]
    found = icm_ray.merge([one], "della", params={"density": density}, output_rank="exact")
    kept = found.adapter.modules["m"].delta().abs() > 1e-4
    assert float(kept.float().mean()) == pytest.approx(density, abs=0.03)


def test_peft_s_dare_drops_entries_of_a_and_of_b_apart(adapter_around) -> None:
    ones = {"m": LoRAFactors(torch.ones(8, 8), torch.ones(8, 8))}
    one = [adapter_around("a", ones)]
    merged = icm_ray.merge(one, "dare", params={"preset": "peft", "density": 0.5})
    factors = merged.adapter.modules["m"]
    assert not torch.equal(factors.a > 0, factors.b > 0)


def test_linear_s_weights_are_on_b_alone_in_preset_nsc(three) -> None:
    weights = (2.0, -0.5, 3.0)
    found = delta(three, "linear", preset="nsc", weights=list(weights))
    own = [adapter.modules["m"] for adapter in three]
    b = sum(w * f.b for w, f in zip(weights, own, strict=True))
    torch.testing.assert_close(found, b @ sum(f.a for f in own), rtol=1e-4, atol=1e-5)


def test_a_moved_capability_is_scaled_and_its_target_is_not(three) -> None:
    target, a, b = (adapter.modules["m"].delta() for adapter in three)
    found = delta(three, "negate_add", target="a", a="b", b="c", scale=0.25)
    torch.testing.assert_close(found, target + 0.25 * (a - b), rtol=1e-4, atol=1e-5)


def test_half_of_the_components_rounded_up_are_kept(three) -> None:
    default, one, two = (delta(three, "svd_latent", components=n) for n in (None, 1, 2))
    assert torch.equal(default, two)
    assert not torch.allclose(default, one)


def test_core_space_elects_nothing_where_a_whole_module_cancels(adapter_around) -> None:
    a, b = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    one = adapter_around("a", {"m": LoRAFactors(a, b)})
    other = adapter_around("b", {"m": LoRAFactors(a, -b)})
    assert not delta([one, other], "core_space").any()


def test_a_decoder_that_says_nothing_leaves_the_adapters_shares(three) -> None:
    shares, evidence = [0.5, 0.25, -2.0], {}
    for module, factors in three[0].modules.items():
        d_out, d_in = factors.shape
        evidence[f"{module}.left"] = torch.zeros(d_out, 0)
        evidence[f"{module}.core"] = torch.zeros(0)
        evidence[f"{module}.right"] = torch.zeros(0, d_in)
        evidence[f"{module}.shares"] = torch.tensor(shares)
    merged = icm_ray.merge(three, "icm_fusion", evidence=evidence, output_rank="exact").adapter
    for module, factors in merged.modules.items():
        own = [share * x.modules[module].delta() for share, x in zip(shares, three, strict=True)]
        torch.testing.assert_close(factors.delta(), sum(own), rtol=1e-4, atol=1e-5)
