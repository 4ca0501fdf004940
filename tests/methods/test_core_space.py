"""Core Space beside its definition with dense SVDs, and beside the methods it runs inside."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import icm_ray
from icm_ray import InputError
from icm_ray.types import Adapter, LoRAFactors

SHAPES = {"l.0": (12, 9), "l.1": (5, 14)}
TURNED_ALIKE = ("task_arithmetic", "tsv", "iso_c", "iso_cts")
"""What gives the same in any orthonormal basis, and so what it gives outside of the core."""


@pytest.fixture
def three(make_adapter) -> list[Adapter]:
    """Unequal ranks; l.1 has more ranks than rows; task c lacks l.0."""
    return [
        make_adapter("a", shapes=SHAPES, rank=2, scaling=2.0),
        make_adapter("b", shapes=SHAPES, rank={"l.0": 3, "l.1": 1}),
        make_adapter("c", shapes={"l.1": SHAPES["l.1"]}, rank=4, scaling=0.5),
    ]


def merged(adapters: Sequence[Adapter], method: str = "core_space", **params) -> dict[str, Tensor]:
    result = icm_ray.merge(adapters, method, params=params, seed=3, output_rank="exact")
    return {module: factors.delta() for module, factors in result.adapter.modules.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for module, delta in expected.items():
        torch.testing.assert_close(
            found[module], delta, rtol=1e-4, atol=1e-5 * float(delta.abs().max())
        )


def core_of(adapters: Sequence[Adapter], module: str) -> tuple[Tensor, Tensor, Tensor]:
    """Left basis, cores and right basis of one module, by dense SVDs of the stacks."""
    factors = [x.modules[module] for x in adapters if module in x.modules]
    u = torch.linalg.svd(torch.cat([f.b for f in factors], 1).double(), full_matrices=False)[0]
    v = torch.linalg.svd(torch.cat([f.a for f in factors]).double(), full_matrices=False)[2]
    return u, torch.stack([u.T @ f.b.double() @ f.a.double() @ v.T for f in factors]), v


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_trims_each_core_in_the_basis_of_the_stacks(three, density: float) -> None:
    expected = {}
    for module in SHAPES:
        u, cores, v = core_of(three, module)
        flat = cores.flatten(1)
        place = flat.shape[1] - int(flat.shape[1] * density)
        least = flat.abs().kthvalue(place, dim=1).values if place else torch.zeros(len(flat))
        kept = torch.where(cores.abs() >= least[:, None, None], cores, 0.0)
        agrees = kept * kept.sum(0) > 0
        mean = (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        expected[module] = (0.5 * u @ mean @ v).float()
    assert_close(merged(three, inner="ties", density=density, scale=0.5), expected)


@pytest.mark.parametrize("inner", TURNED_ALIKE)
def test_what_no_rotation_changes_gives_what_it_gives_outside(make_adapter, inner: str) -> None:
    pair = [make_adapter(n, shapes={"m": (30, 20)}, rank=r) for n, r in (("a", 3), ("b", 5))]
    assert_close(merged(pair, inner=inner, scale=-0.5), merged(pair, inner, scale=-0.5))


def test_tsv_uses_every_direction_of_unequal_ranks(three) -> None:
    u, v, s = [], [], []
    for x in three[:2]:
        parts = torch.linalg.svd(x.modules["l.0"].delta().double(), full_matrices=False)
        rank = x.modules["l.0"].rank
        u, s, v = [*u, parts[0][:, :rank]], [*s, parts[1][:rank]], [*v, parts[2][:rank]]
    sides = [
        torch.linalg.svd(stack, full_matrices=False) for stack in (torch.cat(u, 1), torch.cat(v))
    ]
    (left, right) = (side[0] @ side[2] for side in sides)
    expected = (left * torch.cat(s) @ right).float()
    assert_close(merged(three, inner="tsv"), {"l.0": expected})


def test_cart_adds_the_largest_directions_of_what_is_not_common(three) -> None:
    dense = [x.modules["l.0"].delta().double() for x in three[:2]] + [torch.zeros(12, 9).double()]
    mean = torch.stack(dense).mean(0)
    expected = mean.clone()
    kept = math.ceil(0.3 * 5)  # five directions in all
    for delta in dense:
        u, s, vh = torch.linalg.svd(delta - mean, full_matrices=False)
        expected += 0.5 * (u[:, :kept] * s[:kept]) @ vh[:kept]
    found = merged(three, inner="cart", cart_rank=0.3, cart_scale=0.5)
    assert_close(found, {"l.0": expected.float()})


def test_isotropize_makes_all_singular_values_their_mean(three) -> None:
    plain, equal = merged(three, density=0.4), merged(three, density=0.4, isotropize=True)
    for module, delta in plain.items():
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        rank = int((s > 1e-5 * s[0]).sum())
        expected = s[:rank].mean() * u[:, :rank] @ vh[:rank]
        torch.testing.assert_close(equal[module], expected.float(), rtol=0, atol=1e-4)


def test_weights_multiply_the_cores(three, adapter_around) -> None:
    weights = {"a": 2.0, "b": -0.5, "c": 1.0}
    summed = merged(three, inner="task_arithmetic", weights=weights)
    assert_close(summed, merged(three, "task_arithmetic", weights=weights))
    one = merged(three[:1], inner="ties", density=1.0, weights={"a": -2.0})
    assert_close(one, {m: -2 * f.delta() for m, f in three[0].modules.items()})


def regauged(adapters: Sequence[Adapter], around) -> list[Adapter]:
    return [
        around(x.name, {m: LoRAFactors(f.a * 3.0**k, f.b / 3.0**k) for m, f in x.modules.items()})
        for k, x in enumerate(adapters)
    ]


@pytest.mark.parametrize("inner", ["ties", "dare", "dare_ties", "tsv", "cart"])
def test_balanced_factors_make_the_result_depend_on_the_deltas_alone(
    three, adapter_around, inner: str
) -> None:
    params = {"inner": inner, "density": 0.6, "trim_density": 0.5, "balance": True}
    other = merged(regauged(three, adapter_around), **params)
    assert_close(other, merged(three, **params))


def test_without_balance_the_split_into_factors_decides(three, adapter_around) -> None:
    plain, other = (merged(x, density=0.5) for x in (three, regauged(three, adapter_around)))
    assert not torch.allclose(plain["l.0"], other["l.0"], atol=1e-2)


@pytest.mark.parametrize("inner", ["ties", "dare_ties", "cart", "iso_c"])
def test_a_missing_module_is_a_zero_delta(three, adapter_around, inner: str) -> None:
    zero = LoRAFactors(torch.zeros(2, 9), torch.zeros(12, 2))
    filled = [*three[:2], adapter_around("c", {**three[2].modules, "l.0": zero})]
    params = {"inner": inner, "density": 0.5, "trim_density": 0.4}
    assert_close(merged(filled, **params), merged(three, **params))


def test_factors_without_a_product_merge_to_nothing(adapter_around) -> None:
    left = LoRAFactors(torch.zeros(1, 4), torch.ones(3, 1))
    right = LoRAFactors(torch.ones(1, 4), torch.zeros(3, 1))
    pair = [adapter_around("a", {"m": left}), adapter_around("b", {"m": right})]
    for inner in ("ties", "dare_ties", "tsv", "iso_c", "iso_cts", "cart"):
        assert not merged(pair, inner=inner)["m"].any()


def test_the_rank_is_that_of_the_merged_core(three) -> None:
    result = icm_ray.merge(three, "core_space", params={"inner": "task_arithmetic"})
    assert {m: f.rank for m, f in result.adapter.modules.items()} == {"l.0": 5, "l.1": 5}
    for factors in result.adapter.modules.values():  # evenly shared by both factors
        torch.testing.assert_close(factors.b.norm(dim=0), factors.a.norm(dim=1))


def test_masks_are_those_of_the_cores(three) -> None:
    sizes = {"l.0": (5, 5), "l.1": (5, 7)}
    masks = {f"{m}.mask.{x.name}": torch.ones(sizes[m]) for x in three for m in x.modules}
    params = {"inner": "dare", "density": 0.5}
    result = icm_ray.merge(three, "core_space", params=params, evidence=masks)
    found = {m: f.delta() for m, f in result.adapter.modules.items()}
    assert_close(found, merged(three, "task_arithmetic", scale=2.0))
    wrong = {name: mask.T for name, mask in masks.items()}
    with pytest.raises(InputError, match=r"l\.1\.mask\.a is \(7, 5\) but \(5, 7\) is expected"):
        icm_ray.merge(three, "core_space", params=params, evidence=wrong)


def test_tsv_caps_what_has_no_room_as_the_method_does(make_adapter) -> None:
    adapters = [make_adapter(name, shapes={"l.0": (6, 9)}, rank=3) for name in "abc"]
    assert_close(merged(adapters, inner="tsv"), merged(adapters, "tsv"))
