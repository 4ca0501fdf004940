"""Each method against its formula, written out densely; and what merge() refuses."""

from dataclasses import replace

import pytest
import torch

import icm_ray
from icm_ray import InputError, RecipeError
from icm_ray.types import LoRAFactors

# The toy of the algorithm sheet: D1 = [[2,1],[0,0]], D2 = [[-1,2],[-1,2]].
TOY = {
    "one": LoRAFactors(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0], [0.0]])),
    "two": LoRAFactors(torch.tensor([[-1.0, 2.0]]), torch.tensor([[1.0], [1.0]])),
}


@pytest.fixture
def toy(adapter_around):
    return [adapter_around(name, {"m": factors}) for name, factors in TOY.items()]


def delta(adapters, method: str, **options) -> torch.Tensor:
    return icm_ray.merge(adapters, method, **options).adapter.modules["m"].delta()


HALF = 0.5**0.5


@pytest.mark.parametrize(
    ("method", "params", "rank", "expected"),
    [
        ("soup", {}, None, [[0.5, 1.5], [-0.5, 1]]),
        ("soup", {"weights": [1, 0]}, None, [[2, 1], [0, 0]]),
        ("soup", {"space": "factors"}, None, [[0.5, 1.5], [0.25, 0.75]]),
        ("task_arithmetic", {}, None, [[1, 3], [-1, 2]]),
        ("task_arithmetic", {"scale": 0.5}, None, [[0.5, 1.5], [-0.5, 1]]),
        ("task_arithmetic", {"weights": {"two": -1, "one": 2}}, None, [[5, 0], [1, -2]]),
        ("cat", {}, None, [[0.5, 1.5], [-0.5, 1]]),
        ("svd", {}, None, [[0.1382, 1.5326], [0.0854, 0.9472]]),
        ("svd", {}, 2, [[0.5, 1.5], [-0.5, 1]]),
        ("linear", {}, None, [[1, 3], [0.5, 1.5]]),
        ("linear", {"preset": "nsc"}, None, [[2, 6], [1, 3]]),
        ("linear", {"preset": "nsc", "scale": 0.5}, None, [[1, 3], [0.5, 1.5]]),
        ("negate_add", {"target": "one", "a": "one", "b": "two"}, None, [[5, 0], [1, -2]]),
        ("negate_add", {"target": "one", "a": "two", "b": "one"}, None, [[-1, 2], [-1, 2]]),
    ],
)
def test_toy_values(toy, method: str, params: dict, rank, expected) -> None:
    found = delta(toy, method, params=params, output_rank=rank)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=0
    )


def test_linear_is_peft_s_formula_for_any_sign_rank_and_scaling(make_adapter) -> None:
    weights = {"a": 0.7, "b": -0.4, "c": 0.0}
    adapters = [
        make_adapter(name, shapes={"m": (6, 5)}, rank=rank, scaling=scaling)
        for name, rank, scaling in (("a", 2, 2.0), ("b", 4, 0.5), ("c", 1, 3.0))
    ]
    big_a, big_b = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64)
    for adapter in adapters:
        f = adapter.modules["m"]
        number = weights[adapter.name] * f.scaling
        root = abs(number) ** 0.5
        big_a[: f.rank] += (1 if number >= 0 else -1) * root * f.a
        big_b[:, : f.rank] += root * (f.b.double() / f.scaling)
    found = delta(adapters, "linear", params={"weights": weights})
    torch.testing.assert_close(found.double(), big_b @ big_a, rtol=1e-5, atol=1e-6)


def test_linear_bears_an_alpha_of_zero(adapter_around) -> None:
    silent = LoRAFactors(torch.ones(1, 2), torch.zeros(2, 1), scaling=0.0)
    adapters = [adapter_around("one", {"m": TOY["one"]}), adapter_around("two", {"m": silent})]
    found = delta(adapters, "linear", params={"weights": [1.0, 1.0]})
    torch.testing.assert_close(found, TOY["one"].delta())


def test_taking_the_sibling_for_the_target_gives_the_other_exactly(make_adapter) -> None:
    a, b = make_adapter("a", rank=3), make_adapter("b", rank=2)
    merged = icm_ray.merge([a, b], "negate_add", params={"target": "b", "a": "a", "b": "b"})
    for module, factors in a.modules.items():
        assert torch.equal(merged.adapter.modules[module].delta(), factors.delta())
    assert merged.adapter.fingerprint == a.fingerprint


def test_roles_must_name_adapters(make_adapter) -> None:
    adapters = [make_adapter("math"), make_adapter("code")]
    with pytest.raises(RecipeError) as caught:
        icm_ray.merge(adapters, "negate_add", params={"target": "maths", "a": "code", "b": "x"})
    assert len(caught.value.problems) == 2
    assert "params.target: 'maths' names no adapter" in str(caught.value)
    assert "Did you mean 'math'?" in str(caught.value)


def test_weights_follow_the_given_order_or_names(toy) -> None:
    by_list = delta(toy[::-1], "cat", params={"weights": [3.0, 1.0]})
    by_name = delta(toy, "cat", params={"weights": {"one": 1.0, "two": 3.0}})
    assert torch.equal(by_list, by_name)
    assert icm_ray.merge(toy[::-1], "cat", params={"weights": [3, 1]}).report.params == {
        "weights": {"one": 1.0, "two": 3.0}
    }


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "1 numbers but 2 adapters"),
        ({"one": 1.0}, "names differ from the adapters' .two."),
        ({"one": 1.0, "tow": 1.0}, "tow, two"),
        ([1.0, "2"], "Input should be a valid number"),
        ([1.0, True], "Input should be a valid number"),
        ([1.0, float("nan")], "finite"),
        ("12", "valid dictionary"),
    ],
)
def test_weights_that_do_not_fit_are_refused(toy, weights, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        icm_ray.merge(toy, "soup", params={"weights": weights})


def test_unknown_methods_are_refused_with_the_nearest(toy) -> None:
    with pytest.raises(RecipeError, match=r"method: 'suop' is not known .*Did you mean 'soup'\?"):
        icm_ray.merge(toy, "suop")


def test_what_cannot_be_merged_is_refused(toy, make_adapter) -> None:
    with pytest.raises(InputError, match="at least one is expected"):
        icm_ray.merge([], "soup")
    with pytest.raises(RecipeError, match="evidence: given but method 'soup' uses none"):
        icm_ray.merge(toy, "soup", evidence={})
    with pytest.raises(InputError, match="expected"):
        icm_ray.merge([make_adapter("x", shapes={"m": (3, 3)}), *toy], "soup")
    with pytest.raises(InputError, match="one"):
        icm_ray.merge([toy[0], toy[0]], "soup")


def test_numbers_that_overflow_are_refused(toy) -> None:
    weights = dict.fromkeys((one.name for one in toy), 1e38)
    with pytest.raises(InputError, match="module m: method 'task_arithmetic' gave a number that"):
        icm_ray.merge(toy, "task_arithmetic", params={"scale": 1e6, "weights": weights})
    with pytest.raises(RecipeError, match="less than or equal to 1000000"):
        icm_ray.merge(toy, "task_arithmetic", params={"scale": 1e39})


def test_what_the_inputs_agree_on_is_inherited(make_adapter) -> None:
    def make(name: str, **config):
        return make_adapter(name, config={"target_modules": ["q"], **config}, dtype=torch.float16)

    same = icm_ray.merge([make("a", task_type="X"), make("b", task_type="X")], "soup").adapter
    assert same.config == {"target_modules": ["q"], "task_type": "X"}
    assert same.dtype == torch.float16
    assert same.base_model == "base"
    assert same.name == "soup-of-2"
    other = icm_ray.merge([make("a", task_type="X"), make("b", task_type="Y")], "soup").adapter
    assert "task_type" not in other.config
    mixed = [make("a"), replace(make("b"), dtype=torch.bfloat16)]
    assert icm_ray.merge(mixed, "soup").adapter.dtype == torch.float32


def test_factors_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises((InputError, TypeError)):
        LoRAFactors(torch.zeros(2, 3), torch.zeros(3, 3))
