"""Steps around methods: norms restored, crowded sides calibrated, blocks scaled by depth."""

from typing import Any

import pytest
import torch
from test_contract import assert_close, deltas, evidence_for, same_bits, splits

import icm_ray
from icm_ray import METHODS, RecipeError
from icm_ray.linalg import lowrank
from icm_ray.merging import inputs, passes
from icm_ray.merging import merge as merging
from icm_ray.merging.merge import assemble, merge_as_asked, merge_modules
from icm_ray.merging.order import MergeRequest, plan_merge
from icm_ray.merging.passes import concluded, measure_modules, passes_of
from icm_ray.methods.shared.calibration import calibrated
from icm_ray.methods.steps import STEPS
from icm_ray.types import LoRAFactors

SHAPES = {"embed": (8, 7), "l.2.q": (6, 7), "l.3.q": (6, 7), "l.6.q": (5, 9)}
AROUND = ["soup", "linear", "ties", "dare_ties", "emr", "knots_ties", "iso_c", "regmean", "esm"]
ALL = {"restore_norm": True, "calibrate": "measured", "scale_first": 0.5, "scale_last": 2.0}


@pytest.fixture
def three(make_adapter) -> list[Any]:
    """Adapters of unequal ranks and norms; c lacks a module."""
    without = {m: shape for m, shape in SHAPES.items() if m != "l.2.q"}
    return [
        make_adapter("a", shapes=SHAPES, rank=2, scaling=3.0),
        make_adapter("b", shapes=SHAPES, rank=3),
        make_adapter("c", shapes=without, rank=1, scaling=0.5),
    ]


def merged(adapters, method: str, rank: Any = None, **params: Any):
    told = evidence_for(adapters, method)
    return icm_ray.merge(adapters, method, params=params, evidence=told, output_rank=rank)


def norms(result) -> dict[str, float]:
    return {m: lowrank.norm(f.b, f.a) for m, f in result.adapter.modules.items()}


def test_no_method_has_a_parameter_that_is_called_like_a_step() -> None:
    for row in METHODS.values():
        assert not set(row.parameters()) & set(STEPS), row.name


@pytest.mark.parametrize("method", AROUND)
def test_each_module_gets_the_mean_norm_of_the_adapters_that_change_it(three, method) -> None:
    for rank in (None, 1):
        result = merged(three, method, rank, restore_norm=True)
        for module, norm in norms(result).items():
            own = result.report.modules[module].input_norms.values()
            assert norm == pytest.approx(sum(own) / len(own), rel=1e-4), module
            assert result.report.modules[module].output_norm == pytest.approx(norm, rel=1e-6)


def test_an_adapter_of_no_weight_has_no_say(three) -> None:
    params = {"weights": [1.0, 0.0, 1.0], **ALL}
    found = merged(three, "soup", **params)
    alone = merged([three[0], three[2]], "soup", **{**params, "weights": [1.0, 1.0]})
    assert_close(deltas(found), deltas(alone))


def test_nothing_stays_nothing(adapter_around) -> None:
    zero = {"l.0": LoRAFactors(torch.ones(2, 5), torch.zeros(6, 2))}
    result = merged([adapter_around(name, zero) for name in "ab"], "soup", **ALL)
    assert not deltas(result)["l.0"].any()


def test_blocks_are_scaled_between_the_first_and_the_last(three) -> None:
    plain = deltas(merged(three, "soup"))
    found = deltas(merged(three, "soup", scale_first=0.5, scale_last=2.5))
    factors = {"embed": 1.0, "l.2.q": 0.5, "l.3.q": 1.0, "l.6.q": 2.5}
    assert_close(found, {m: factors[m] * delta for m, delta in plain.items()})


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_side_is_calibrated_as_its_formula_says(three, side) -> None:
    factors = [x.modules["l.6.q"] for x in three]
    stack = torch.cat([f.a.T if side == "a" else f.b for f in factors], 1).double()
    u, s, _ = torch.linalg.svd(stack, full_matrices=False)
    weaken = u @ torch.diag(1 / (1 + 2 * s**2 / (s**2).sum()) - 1) @ u.T
    for f, own in zip(factors, calibrated(factors, side), strict=True):
        b, a = f.b.double(), f.a.double()
        expected = b @ (a + a @ weaken) if side == "a" else (b + weaken @ b) @ a
        torch.testing.assert_close(own.delta(), expected.float(), rtol=1e-4, atol=1e-5)


def test_the_side_that_is_shared_is_the_one_that_is_calibrated(make_adapter) -> None:
    one, two = (make_adapter(n, shapes={"m": (9, 8)}, rank=2).modules["m"] for n in "ab")
    alike = [one, LoRAFactors(one.a, two.b)]
    for found, expected in zip(calibrated(alike, "measured"), calibrated(alike, "a"), strict=True):
        assert torch.equal(found.a, expected.a)
        assert torch.equal(found.b, expected.b)
    (alone,) = calibrated([one], "measured")
    torch.testing.assert_close(alone.delta(), one.delta())


@pytest.mark.parametrize("method", AROUND)
def test_steps_come_out_alike_for_any_split_over_workers(three, method) -> None:
    told = evidence_for(three, method)
    by_name = {adapter.name: adapter for adapter in three}
    order = plan_merge(three, MergeRequest(method, ALL, told, seed=0))
    whole = merged(three, method, **ALL)
    for parts in splits(list(order.present)):

        def read(task: str, module: str) -> LoRAFactors:
            return by_name[task].modules[module]

        known, done = order, {}
        for number in range(len(passes_of(order))):
            measured = [measure_modules(known, number, part, read) for part in parts]
            known = concluded(known, number, measured)
        for part in parts:
            done |= merge_modules(known, part, read)
        again = assemble(known, done, three)
        assert same_bits(again, whole)
        assert again.report == whole.report


@pytest.mark.parametrize("method", ["soup", "ties"])
def test_steps_on_another_device_leave_nothing_behind(
    three, method, accelerator, monkeypatch
) -> None:
    for module in (inputs, merging, passes):
        monkeypatch.setattr(module, "find_device", accelerator.find)
    with accelerator.on():
        there = merge_as_asked(three, MergeRequest(method, ALL, device="cuda"))
    assert_close(deltas(there), deltas(merged(three, method, **ALL)))


def test_the_report_names_the_steps_that_were_asked_for(three) -> None:
    plain = merged(three, "soup", restore_norm=False, scale_last=1.0)
    assert plain.report == merged(three, "soup").report
    report = merged(three, "soup", **ALL).report
    assert {name: report.params[name] for name in STEPS} == ALL


@pytest.mark.parametrize(
    ("method", "params", "line"),
    [
        ("soup", {"calibrate": "c"}, "params.calibrate: 'c'"),
        ("soup", {"restore_norm": 1}, "params.restore_norm: 1"),
        ("soup", {"restore_nrom": True}, "Did you mean 'restore_norm'?"),
        ("nsc", {"calibrate": "a"}, "method 'nsc' was learned on the adapters as they are"),
    ],
)
def test_what_is_no_step_is_refused(three, method, params, line) -> None:
    with pytest.raises(RecipeError) as caught:
        merged(three, method, **params)
    assert line in str(caught.value)
