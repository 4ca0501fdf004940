"""What holds for every row of METHODS; a row opts out of a property by name, with a reason.

Properties a row may name in `exempt`: identity, homogeneity, scaling. Everything else holds always.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import icm_ray
from icm_ray import METHODS, RecipeError
from icm_ray.merging import inputs, passes
from icm_ray.merging import merge as merging
from icm_ray.merging.merge import assemble, merge_as_asked, merge_modules
from icm_ray.merging.order import MergeRequest, plan_merge
from icm_ray.merging.passes import concluded, measure_modules, passes_of
from icm_ray.methods.table import PASSED_IN
from icm_ray.seeding import generator
from icm_ray.types import Adapter, LoRAFactors, MergeResult

# Parameters that leave a single adapter as it is, and that every property is tested with. Names
# of adapters are a, b, c; methods with roles say who plays what.
PARAMS: dict[str, list[dict[str, Any]]] = {
    "soup": [{}, {"space": "factors"}, {"restore_norm": True}],
    "linear": [{}, {"preset": "nsc"}],
    "negate_add": [{"target": "a", "a": "a", "b": "a"}],
    "svd_latent": [{}, {"space": "delta"}],
    "lora_lego": [{}, {"preset": "nsc"}],
    "esm": [{}, {"preset": "roberta"}],
    "fr_merging": [{}, {"align": False}],
    "knots_ties": [{"density": 1.0}, {"density": 1.0, "preset": "nsc"}],
    "knots_dare_ties": [{"density": 1.0}, {"density": 1.0, "preset": "nsc"}],
    "core_space": [
        {"inner": inner, "density": 1.0, **more}
        for inner in ("ties", "task_arithmetic", "dare", "dare_ties", "tsv", "cart")
        for more in ({}, {"balance": True})
    ],
    "compress_then_merge": [
        {"inner": inner, "density": 1.0, "scale": 1.0}
        for inner in ("ties", "task_arithmetic", "dare_ties")
    ],
    "emr": [{}, {"preset": "paper"}],
    "ties": [
        {"density": 1.0, "preset": preset}
        for preset in ("ties", "core", "nsc", "peft_svd", "mergekit")
    ],
    "dare": [{"density": 1.0}],
    "dare_ties": [
        {"density": 1.0, "preset": preset}
        for preset in ("dare_ties", "nsc", "peft_svd", "mergekit")
    ],
    "magnitude_prune": [{"density": 1.0}],
    "breadcrumbs": [{"density": 1.0}],
    "della": [{"density": 1.0}],
}
# Roles of three adapters where the parameters above name only one.
OF_THREE: dict[str, dict[str, Any]] = {"negate_add": {"target": "b", "a": "a", "b": "c"}}

# Parameters whose result does not depend on how deltas are split, where others' does: soup's
# space="factors" adds up factors, and ties and dare look at entries of cores, whose basis comes
# from the factors unless these are balanced.
GAUGE_FREE = {
    "soup": [{}, {"restore_norm": True}],
    "core_space": [
        p
        for p in PARAMS["core_space"]
        if p.get("balance") or p["inner"] not in ("ties", "dare", "dare_ties")
    ],
}

# With these a single adapter loses entries, and so do three equal ones; all else has to hold.
SPARSE: dict[str, list[dict[str, Any]]] = {
    "ties": [{"density": 0.3}, {"density": 0.3, "preset": "core"}],
    "dare": [{"density": 0.5}],
    "dare_ties": [{"density": 0.5}, {"density": 0.5, "preset": "nsc", "trim_density": 0.6}],
    "magnitude_prune": [{"density": 0.3}],
    "breadcrumbs": [{"density": 0.5, "gamma": 0.1}],
    "della": [{"density": 0.5}],
    "knots_ties": [{"density": 0.3}],
    "knots_dare_ties": [{"density": 0.5}],
    "core_space": [{"inner": "ties", "density": 0.5, "balance": True}],
    "compress_then_merge": [{"rank": 1}, {"inner": "iso_c"}],
}
ROWS = [
    (name, params)
    for name in METHODS
    for params in (*PARAMS.get(name, [{}]), *SPARSE.get(name, ()))
]
EXEMPTIONS = ("identity", "homogeneity", "scaling")


def merge(adapters: Sequence[Adapter], method: str, **order: Any) -> MergeResult:
    """Merge as a user would, with evidence where the method needs it."""
    return icm_ray.merge(adapters, method, evidence=evidence_for(adapters, method), **order)


def evidence_for(adapters: Sequence[Adapter], method: str) -> dict[str, torch.Tensor] | None:
    """Return what the method needs: a Gram of each task's inputs for every module."""
    if METHODS[method].needs is None:
        return None
    if METHODS[method].needs == "learned_merge":
        return coefficients_for(adapters)
    if METHODS[method].needs == "fusion_model":
        return averages_for(adapters)
    assert METHODS[method].needs == "gram_statistics"
    widths = {m: f.shape[1] for adapter in adapters for m, f in adapter.modules.items()}
    grams = {}
    for adapter in adapters:
        for module, d_in in widths.items():
            draw = generator("gram", adapter.name, module)
            x = torch.randn(3 * d_in, d_in, generator=draw, dtype=torch.float64)
            grams[f"{module}.gram.{adapter.name}"] = (x.T @ x / (3 * d_in)).float()
    return grams


def coefficients_for(adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """Return a coefficient for each task and module, keyed by their names; 1 for one adapter."""
    names = sorted(adapter.name for adapter in adapters)
    modules = {module for adapter in adapters for module in adapter.modules}
    found = {}
    for module in modules:
        rows = [torch.rand(1, generator=generator("coefficient", n, module)) for n in names]
        values = torch.stack(rows) if len(names) > 1 else torch.ones(1, 1)
        found[f"{module}.coefficients"] = values
    return found


def averages_for(adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """Return what a Fusion-VAE that decodes to nothing leaves: the adapters' average."""
    found = {}
    for module, (d_out, d_in) in {
        m: f.shape for a in adapters for m, f in a.modules.items()
    }.items():
        found[f"{module}.left"], found[f"{module}.core"] = torch.zeros(d_out, 0), torch.zeros(0)
        found[f"{module}.right"] = torch.zeros(0, d_in)
        found[f"{module}.shares"] = torch.full((len(adapters),), 1 / len(adapters))
    return found


def each_row() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("method", "params"), ROWS, ids=[f"{n}{list(p.values()) or ''}" for n, p in ROWS]
    )


def three(params: Mapping[str, Any], method: str) -> dict[str, Any]:
    return {**params, **OF_THREE.get(method, {})}


def rows_with(property_name: str) -> list[tuple[str, dict[str, Any]]]:
    return [(n, p) for n, p in ROWS if property_name not in METHODS[n].exempt]


def deltas(result: MergeResult | Adapter) -> dict[str, torch.Tensor]:
    adapter = result.adapter if isinstance(result, MergeResult) else result
    return {module: factors.delta() for module, factors in adapter.modules.items()}


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for module, delta in expected.items():
        atol = 2e-5 * max(float(delta.abs().max()), 1e-30)
        torch.testing.assert_close(found[module], delta, rtol=1e-4, atol=atol)


def same_bits(one: MergeResult, two: MergeResult) -> bool:
    return one.adapter.fingerprint == two.adapter.fingerprint and all(
        torch.equal(f.a, two.adapter.modules[m].a) and torch.equal(f.b, two.adapter.modules[m].b)
        for m, f in one.adapter.modules.items()
    )


@pytest.fixture
def abc(make_adapter) -> list[Adapter]:
    """Three adapters of unequal ranks and scalings; each lacks a module another has."""
    shapes = {"l.0": (6, 5), "l.1": (4, 7), "l.2": (6, 5)}
    return [
        make_adapter("a", shapes={m: shapes[m] for m in ("l.0", "l.1")}, rank=2, scaling=2.0),
        make_adapter("b", shapes=shapes, rank={"l.0": 3, "l.1": 1, "l.2": 4}),
        make_adapter("c", shapes={m: shapes[m] for m in ("l.1", "l.2")}, rank=1, scaling=0.5),
    ]


def test_what_is_told_of_a_method_is_what_its_code_says() -> None:
    for name, row in METHODS.items():
        signature = inspect.signature(row.function, eval_str=True)
        own = {key: one for key, one in signature.parameters.items() if key not in PASSED_IN}
        keywords = {key: one for key, one in own.items() if one.kind is one.KEYWORD_ONLY}
        assert str(keywords) == str(row.parameters()), name
        assert inspect.getdoc(row.function) == row.doc, name


def test_every_method_is_covered_and_every_exemption_is_known() -> None:
    assert {name for name, _ in ROWS} == set(METHODS)
    for name, row in METHODS.items():
        assert set(row.exempt) <= set(EXEMPTIONS), name
        assert all(len(reason) > 20 for reason in row.exempt.values()), f"{name}: say why"


@each_row()
@settings(max_examples=8)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.sampled_from([1.0, 0.25, -3.0]))
def test_one_adapter_gives_itself_back(
    make_adapter, method: str, params: dict, d_out: int, d_in: int, rank: int, scaling: float
) -> None:
    if "identity" in METHODS[method].exempt or params in SPARSE.get(method, ()):
        return
    shapes = {"m": (d_out, d_in), "n": (d_in, d_out)}
    one = make_adapter("a", shapes=shapes, rank=rank, scaling=scaling)
    assert_close(deltas(merge([one], method, params=params)), deltas(one))


@each_row()
def test_the_order_of_the_adapters_does_not_matter(abc, method: str, params: dict) -> None:
    chosen = three(params, method)
    forward = merge(abc, method, params=chosen)
    backward = merge(abc[::-1], method, params=chosen)
    assert same_bits(forward, backward)
    assert forward.report == backward.report
    assert forward.adapter.config == backward.adapter.config


BY_LAYER = [
    name
    for name, row in METHODS.items()
    # icm_fusion's weights choose a place among latents, which hold all layers.
    if "weights" in row.parameters() and name != "icm_fusion"
]


@pytest.mark.parametrize("method", BY_LAYER)
def test_weights_of_layer_groups_are_each_group_s_own(make_adapter, method: str) -> None:
    shapes = {f"layer.{block}.q": (6, 5) for block in range(3)}
    pair = [make_adapter(name, shapes=shapes) for name in "ab"]
    params = PARAMS.get(method, [{}])[0]
    whole = merge(pair, method, params={**params, "weights": {"a": [0.5, 0.5], "b": 2.0}})
    plain = merge(pair, method, params={**params, "weights": {"a": 0.5, "b": 2.0}})
    split = merge(pair, method, params={**params, "weights": {"a": [0.0, 0.5], "b": [0.0, 2.0]}})
    for module, factors in plain.adapter.modules.items():
        assert torch.equal(factors.delta(), whole.adapter.modules[module].delta())
        left_out = module in ("layer.0.q", "layer.1.q")
        assert (split.report.modules[module].output_norm == 0) == left_out
    with pytest.raises(RecipeError, match="3 blocks"):
        merge(pair, method, params={**params, "weights": {"a": [1.0] * 4, "b": 1.0}})


@each_row()
def test_inputs_are_left_as_they_were(abc, method: str, params: dict) -> None:
    before = [
        {m: (f.a.clone(), f.b.clone()) for m, f in adapter.modules.items()} for adapter in abc
    ]
    result = merge(abc, method, params=three(params, method))
    for factors in result.adapter.modules.values():  # nor is the result a view of an input
        factors.a.add_(1)
        factors.b.add_(1)
    for adapter, modules in zip(abc, before, strict=True):
        for module, (a, b) in modules.items():
            assert torch.equal(adapter.modules[module].a, a)
            assert torch.equal(adapter.modules[module].b, b)


@each_row()
@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_nothing_in_nothing_out(adapter_around, method: str, params: dict, zero: str) -> None:
    a = torch.zeros(2, 5) if zero != "b" else torch.ones(2, 5)
    b = torch.zeros(6, 2) if zero != "a" else torch.ones(6, 2)
    adapters = [adapter_around(name, {"m": LoRAFactors(a, b)}) for name in "abc"]
    for rank in (None, 1, "exact", "energy:0.9", "serving:8"):
        chosen = three(params, method)
        result = merge(adapters, method, params=chosen, output_rank=rank)
        assert torch.equal(result.adapter.modules["m"].delta(), torch.zeros(6, 5))
        report = result.report.modules["m"]
        assert (report.output_norm, report.retained_energy, report.truncation_error) == (0, 1, 0)
        assert result.report.retained_energy == 1.0


@each_row()
def test_modules_that_hold_no_rank_at_all(adapter_around, method: str, params: dict) -> None:
    empty = {"m": LoRAFactors(torch.zeros(0, 5), torch.zeros(6, 0))}
    adapters = [adapter_around(name, empty) for name in "abc"]
    result = merge(adapters, method, params=three(params, method))
    assert torch.equal(result.adapter.modules["m"].delta(), torch.zeros(6, 5))


@each_row()
def test_duplicates_and_deficient_ranks_stay_finite(
    make_adapter, adapter_around, method: str, params: dict
) -> None:
    shapes = {"q": (12, 10), "v": (9, 10)}  # room for three adapters of rank two
    one = make_adapter("a", shapes=shapes, rank=3)
    modules = {m: LoRAFactors(f.a[[0, 0, 1]], f.b[:, [1, 1, 0]]) for m, f in one.modules.items()}
    adapters = [adapter_around(name, modules) for name in "abc"]
    for rank in (None, 1, "exact", "energy:0.99", "serving:8"):
        chosen = three(params, method)
        result = merge(adapters, method, params=chosen, output_rank=rank)
        assert all(torch.isfinite(delta).all() for delta in deltas(result).values())
    again = merge(adapters, method, params=three(params, method))
    # Three times the same points nowhere new: the result is a multiple of the one adapter,
    # except where factors are mixed.
    exempt = METHODS[method].exempt
    mixes = {"scaling", "identity"} & set(exempt) or params.get("space") == "factors"
    if not mixes and params not in SPARSE.get(method, ()):
        for module, delta in deltas(again).items():
            rank = torch.linalg.matrix_rank(
                torch.stack([delta, modules[module].delta()]).flatten(1)
            )
            assert rank == 1


def gauge_rows() -> list[tuple[str, dict[str, Any]]]:
    rows = rows_with("scaling")
    return [(n, p) for n, p in rows if p in (*GAUGE_FREE.get(n, [p]), *SPARSE.get(n, ()))]


def regauged(adapters: Sequence[Adapter], around: Callable[..., Adapter]) -> list[Adapter]:
    """Split every delta differently into factors: by powers of two, other ones in each adapter."""
    changed = []
    for power, adapter in enumerate(adapters, start=1):
        c = 2.0**power
        modules = {m: LoRAFactors(f.a * c, f.b / c, f.scaling) for m, f in adapter.modules.items()}
        changed.append(around(adapter.name, modules))
    return changed


@pytest.mark.parametrize(("method", "params"), gauge_rows())
def test_how_a_delta_is_split_does_not_matter(abc, adapter_around, method, params) -> None:
    chosen = three(params, method)
    plain = merge(abc, method, params=chosen)
    other = merge(regauged(abc, adapter_around), method, params=chosen)
    assert_close(deltas(other), deltas(plain))


@each_row()
def test_the_result_grows_with_its_inputs(abc, adapter_around, method: str, params: dict) -> None:
    if "homogeneity" in METHODS[method].exempt:
        return
    larger = [
        adapter_around(
            x.name, {m: LoRAFactors(f.a, f.b * 8, f.scaling * 8) for m, f in x.modules.items()}
        )
        for x in abc
    ]
    chosen = three(params, method)
    expected = {m: 8 * d for m, d in deltas(merge(abc, method, params=chosen)).items()}
    assert_close(deltas(merge(larger, method, params=chosen)), expected)


@each_row()
def test_a_scale_multiplies_the_result(abc, method: str, params: dict) -> None:
    if "scale" not in METHODS[method].parameters() or method == "negate_add":  # of the difference
        return
    once, thrice = (merge(abc, method, params={**params, "scale": s}) for s in (1.0, -3.0))
    assert_close(deltas(thrice), {module: -3 * delta for module, delta in deltas(once).items()})


def splits(modules: Sequence[str]) -> Iterator[list[list[str]]]:
    yield [[module] for module in modules]
    yield [list(modules[1:]), list(modules[:1])]
    yield [list(reversed(modules)), []]


@each_row()
@pytest.mark.parametrize("rank", [None, "energy:0.9", "total:4"])
def test_any_split_over_workers_gives_the_same_bits(abc, method: str, params: dict, rank) -> None:
    chosen = three(params, method)
    order = plan_merge(abc, MergeRequest(method, chosen, evidence_for(abc, method), rank, seed=3))
    by_name = {adapter.name: adapter for adapter in abc}
    whole = merge(abc, method, params=chosen, output_rank=rank, seed=3)
    for parts in splits(list(order.present)):

        def read(task: str, module: str) -> LoRAFactors:
            return by_name[task].modules[module]

        told = order
        for number in range(len(passes_of(order))):
            measured = [measure_modules(told, number, part, read) for part in parts]
            told = concluded(told, number, measured)
        merged: dict[str, Any] = {}
        for part in parts:
            merged |= merge_modules(told, part, read)
        again = assemble(told, merged, abc)
        assert same_bits(again, whole)
        assert again.report == whole.report


@each_row()
def test_seeds_repeat(abc, method: str, params: dict) -> None:
    chosen = three(params, method)
    one, two = (merge(abc, method, params=chosen, seed=5) for _ in range(2))
    assert same_bits(one, two)
    assert one.report.seed == 5


@each_row()
def test_modules_missing_in_some_adapters_count_as_no_change(
    abc, adapter_around, method: str, params: dict
) -> None:
    def filled(adapter: Adapter) -> Adapter:
        zeros = {
            m: LoRAFactors(torch.zeros(1, f.shape[1]), torch.zeros(f.shape[0], 1))
            for other in abc
            for m, f in other.modules.items()
        }
        return adapter_around(adapter.name, {**zeros, **adapter.modules})

    chosen = three(params, method)
    result = merge(abc, method, params=chosen)
    assert_close(deltas(result), deltas(merge(list(map(filled, abc)), method, params=chosen)))
    assert {m: r.absent for m, r in result.report.modules.items()} == {
        "l.0": ("c",),
        "l.1": (),
        "l.2": ("a",),
    }
    assert list(result.report.modules["l.0"].input_norms) == ["a", "b"]


@each_row()
def test_reports_and_adapters_travel(abc, method: str, params: dict) -> None:
    import json
    import pickle

    from icm_ray.merging.folder import report_as_dict, report_from_dict

    result = merge(abc, method, params=three(params, method), output_rank="energy:0.9")
    plain = json.loads(json.dumps(report_as_dict(result.report), allow_nan=False))
    assert report_from_dict(plain) == result.report
    assert same_bits(pickle.loads(pickle.dumps(result)), result)
    assert set(result.report.inputs) == {"a", "b", "c"}
    assert result.report.formula == METHODS[method].formula


@pytest.mark.parametrize("method", METHODS)
def test_unknown_parameters_are_refused_with_the_nearest(make_adapter, method: str) -> None:
    known = list(METHODS[method].parameters())
    roles = PARAMS.get(method, [{}])[0]
    with pytest.raises(RecipeError) as caught:
        merge([make_adapter("a")], method, params={**roles, f"{known[0]}x": 1})
    assert f"params.{known[0]}x: method {method!r} has no such parameter" in str(caught.value)
    assert f"Did you mean {known[0]!r}?" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_wrong_types_and_ranges_are_refused_all_at_once(make_adapter, method: str) -> None:
    roles = PARAMS.get(method, [{}])[0]
    wrong: list[object] = [object(), float("nan"), float("inf"), [1, 2, 3], {"z": 1.0}, "7"]
    for name in METHODS[method].parameters():
        for value in wrong:
            with pytest.raises(RecipeError, match=rf"params\.{name}: "):
                merge([make_adapter("a")], method, params={**roles, name: value})
    everything = dict.fromkeys(METHODS[method].parameters(), "7")
    with pytest.raises(RecipeError) as caught:
        merge([make_adapter("a")], method, params={**everything, "zzz": 1})
    assert len(caught.value.problems) == len(everything) + 1


@pytest.mark.parametrize("method", METHODS)
def test_rows_describe_themselves(method: str) -> None:
    import json

    row = METHODS[method]
    schema = json.loads(json.dumps(row.schema(), allow_nan=False))
    assert schema["summary"].endswith(".")
    assert set(schema["parameters"]) == set(row.parameters())
    for name, parameter in schema["parameters"].items():
        assert parameter.get("description"), f"{method}.{name} has no description"
        assert "default" in parameter
        assert {"type", "anyOf", "enum", "const"} & set(parameter), f"{method}.{name} has no type"
    assert schema["default_rank"] in ("exact", "largest input")
    assert row.bind(PARAMS.get(method, [{}])[0], ["a"])


def holds(property_name: str, method: str, params: dict, abc, adapter_around) -> bool:
    """Say whether a property that a row opted out of holds all the same."""
    chosen = three(params, method)
    try:
        if property_name == "scaling":
            test_how_a_delta_is_split_does_not_matter(abc, adapter_around, method, params)
        elif property_name == "identity":
            assert_close(deltas(merge([abc[1]], method, params=chosen)), deltas(abc[1]))
        else:
            larger = [
                adapter_around(
                    x.name,
                    {m: LoRAFactors(f.a, f.b * 8, f.scaling * 8) for m, f in x.modules.items()},
                )
                for x in abc
            ]
            plain = deltas(merge(abc, method, params=chosen))
            grown = deltas(merge(larger, method, params=chosen))
            assert_close(grown, {m: 8 * delta for m, delta in plain.items()})
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    ("method", "exempt"), [(n, e) for n, row in METHODS.items() for e in row.exempt]
)
def test_every_exemption_is_needed(abc, adapter_around, method: str, exempt: str) -> None:
    assert not all(
        holds(exempt, method, params, abc, adapter_around) for params in PARAMS.get(method, [{}])
    )


@each_row()
def test_on_another_device_nothing_stays_behind(
    method, params, abc, accelerator, monkeypatch
) -> None:
    for module in (inputs, merging, passes):
        monkeypatch.setattr(module, "find_device", accelerator.find)
    request = MergeRequest(method, three(params, method), evidence_for(abc, method), seed=3)
    here = merge_as_asked(abc, request)
    with accelerator.on():
        there = merge_as_asked(abc, replace(request, device="cuda"))
    for factors in there.adapter.modules.values():
        assert factors.a.device.type == factors.b.device.type == "cpu"
    assert_close(deltas(there), deltas(here))
