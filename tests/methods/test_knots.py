"""KnOTS beside the same merge of the deltas side by side, by a dense SVD in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import icm_ray
from icm_ray import InputError
from icm_ray.types import Adapter, LoRAFactors

SHAPES = {"l.0": (12, 9), "l.1": (7, 10), "l.2": (3, 8)}
METHODS = ("knots_ties", "knots_dare_ties")


@pytest.fixture
def three(make_adapter) -> list[Adapter]:
    """Unequal ranks; l.2 has more ranks than rows; task c lacks l.0."""
    return [
        make_adapter("a", shapes=SHAPES, rank=2, scaling=2.0),
        make_adapter("b", shapes=SHAPES, rank={"l.0": 3, "l.1": 1, "l.2": 4}),
        make_adapter("c", shapes={m: SHAPES[m] for m in ("l.1", "l.2")}, rank=2, scaling=0.5),
    ]


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {module: factors.delta() for module, factors in adapter.modules.items()}


def merged(adapters: Sequence[Adapter], method: str = "knots_ties", **params) -> dict[str, Tensor]:
    result = icm_ray.merge(adapters, method, params=params, seed=3)
    return deltas(result.adapter)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for module, delta in expected.items():
        torch.testing.assert_close(
            found[module], delta, rtol=1e-4, atol=1e-5 * float(delta.abs().max())
        )


def by_dense_svd(adapters: Sequence[Adapter], density: float) -> dict[str, Tensor]:
    """The definition: SVD of the deltas side by side, TIES with one threshold a task, back."""
    bases, coordinates = {}, {}
    for module, (d_out, d_in) in SHAPES.items():
        zero = LoRAFactors(torch.zeros(1, d_in), torch.zeros(d_out, 1))
        each = [a.modules.get(module, zero).delta().double() for a in adapters]
        u, s, vh = torch.linalg.svd(torch.cat(each, dim=1), full_matrices=False)
        keep = s > 1e-6 * s[0]
        bases[module] = u[:, keep]
        coordinates[module] = (s[keep, None] * vh[keep]).view(-1, len(adapters), d_in)
    rows = torch.cat([c.transpose(0, 1).flatten(1) for c in coordinates.values()], dim=1)
    size = rows.shape[1]
    place = size - int(size * density)
    least = rows.abs().kthvalue(place, dim=1).values if place else torch.zeros(len(rows))
    result = {}
    for module, values in coordinates.items():
        kept = torch.where(values.abs() >= least[:, None], values, 0.0)
        agrees = kept * kept.sum(1, keepdim=True) > 0
        mean = (kept * agrees).sum(1) / agrees.sum(1).clamp(min=1)
        result[module] = (bases[module] @ mean).float()
    return result


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_knots_ties_is_ties_in_the_basis_of_a_dense_svd(three, density: float) -> None:
    assert_close(merged(three, density=density), by_dense_svd(three, density))


def test_two_rank_one_adapters_by_hand(adapter_around) -> None:
    pair = [
        adapter_around("a", {"m": LoRAFactors(torch.tensor([[2.0, 1.0]]), torch.eye(2)[:, :1])}),
        adapter_around("b", {"m": LoRAFactors(torch.tensor([[-1.0, 2.0]]), torch.ones(2, 1))}),
    ]
    expected = torch.tensor([[1.8090, 1.1910], [0.3090, 1.5000]])
    found = merged(pair, density=1.0)["m"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def regauged(adapters: Sequence[Adapter], around) -> list[Adapter]:
    """The same deltas, their factors mixed by another invertible matrix in each adapter."""
    changed = []
    for seed, adapter in enumerate(adapters):
        modules = {}
        for module, f in adapter.modules.items():
            mix = torch.randn(f.rank, f.rank, generator=torch.Generator().manual_seed(seed))
            mix = (mix + 3 * torch.eye(f.rank)).double()
            a, b = mix @ f.a.double(), f.b.double() @ mix.inverse()
            modules[module] = LoRAFactors(a.float(), b.float())
        changed.append(around(adapter.name, modules))
    return changed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["knots", "nsc"])
def test_only_the_deltas_matter(three, adapter_around, method: str, preset: str) -> None:
    trim = {"density": 0.4} if method == "knots_ties" else {"density": 0.6, "trim_density": 0.7}
    params = {**trim, "preset": preset}
    other = merged(regauged(three, adapter_around), method, **params)
    assert_close(other, merged(three, method, **params))


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_module_is_a_zero_delta(three, adapter_around, method: str) -> None:
    zero = LoRAFactors(torch.zeros(2, 9), torch.zeros(12, 2))
    filled = [*three[:2], adapter_around("c", {**three[2].modules, "l.0": zero})]
    params = {"density": 0.5, **({"trim_density": 0.4} if method == "knots_dare_ties" else {})}
    assert_close(merged(filled, method, **params), merged(three, method, **params))


def test_adapters_of_any_size_keep_their_directions(three, adapter_around) -> None:
    tiny = [
        adapter_around(x.name, {m: LoRAFactors(f.a, f.b * 2.0**-30) for m, f in x.modules.items()})
        for x in three
    ]
    small, plain = merged(tiny, density=0.5), merged(three, density=0.5)
    assert all(torch.equal(small[m] * 2.0**30, plain[m]) for m in plain)


def test_the_result_has_the_rank_of_the_deltas_together(three) -> None:
    result = icm_ray.merge(three, "knots_ties", params={"density": 0.5})
    ranks = {m: f.rank for m, f in result.adapter.modules.items()}
    assert ranks == {"l.0": 5, "l.1": 5, "l.2": 3}
    for factors in result.adapter.modules.values():
        gram = factors.b.T @ factors.b
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-6)
        largest = factors.b.gather(0, factors.b.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()


def test_evidence_turns_the_vectors_the_sign_election_depends_on(three) -> None:
    params = {"density": 0.8, "preset": "nsc"}
    plain = icm_ray.merge(three, "knots_ties", params=params)
    vectors = {f"{m}.U": f.b.clone() for m, f in plain.adapter.modules.items()}
    same = icm_ray.merge(three, "knots_ties", params=params, evidence=vectors)
    assert_close(deltas(same.adapter), deltas(plain.adapter))
    vectors["l.0.U"][:, 0] *= -1
    turned = icm_ray.merge(three, "knots_ties", params=params, evidence=vectors)
    b, others = turned.adapter.modules["l.0"].b, plain.adapter.modules["l.0"].b
    assert torch.equal(b[:, 0], -others[:, 0])
    assert torch.equal(b[:, 1:], others[:, 1:])
    assert not torch.allclose(deltas(turned.adapter)["l.0"], deltas(plain.adapter)["l.0"])


@pytest.mark.parametrize("method", METHODS)
def test_vectors_of_another_shape_are_refused(three, method: str) -> None:
    vectors = {f"{m}.U": torch.ones(SHAPES[m][0], 1) for m in SHAPES}
    with pytest.raises(InputError, match=r"evidence: l\.0\.U is \(12, 1\) but \(12, 5\)"):
        icm_ray.merge(three, method, evidence=vectors)


def test_masks_keep_coordinates(three) -> None:
    ranks = {"l.0": 5, "l.1": 5, "l.2": 3}
    masks = {
        f"{m}.mask.{x.name}": torch.zeros(ranks[m], SHAPES[m][1]) for x in three for m in x.modules
    }
    masks["l.1.mask.b"][0, 2] = 1
    params = {"density": 0.5, "scale": 3.0}
    result = icm_ray.merge(three, "knots_dare_ties", params=params, evidence=masks)
    coordinates = {m: f.b.T @ f.delta() for m, f in result.adapter.modules.items()}
    u = result.adapter.modules["l.1"].b
    expected = torch.zeros(5, 10)
    expected[0, 2] = 3.0 / 0.5 * (u.T @ three[1].modules["l.1"].delta())[0, 2]
    torch.testing.assert_close(coordinates["l.1"], expected, rtol=1e-5, atol=1e-6)
    assert not coordinates["l.0"].any()
    assert not coordinates["l.2"].any()


def test_dare_draws_follow_seed_and_share(make_adapter) -> None:
    pair = [make_adapter(n, shapes={"m": (40, 300)}, rank=4) for n in "ab"]
    params = {"density": 0.7}
    one, two = (
        icm_ray.merge(pair, "knots_dare_ties", params=params, seed=s).adapter for s in (1, 2)
    )
    assert not torch.equal(one.modules["m"].a, two.modules["m"].a)
    # Half of the entries of two tasks agree in sign; one alone survives where they do not.
    single = icm_ray.merge(pair[:1], "knots_dare_ties", params=params, seed=1).adapter
    assert float((single.modules["m"].a != 0).float().mean()) == pytest.approx(0.7, abs=0.05)


def test_preset_core_merges_right_singular_vectors_module_by_module(make_adapter) -> None:
    adapters = [make_adapter(name, shapes={"l.0": (12, 9)}, rank=2) for name in "abc"]
    found = merged(adapters, preset="core", density=0.5)["l.0"]
    dense = [adapter.modules["l.0"].delta().double() for adapter in adapters]
    u, s, vh = torch.linalg.svd(torch.cat(dense, 1), full_matrices=False)
    u, s, vh = u[:, s > 1e-6], s[s > 1e-6], vh[s > 1e-6]
    kept = []
    for part in vh.split(9, 1):
        k = part.numel() - int(part.numel() * 0.5)
        least = part.abs().flatten().kthvalue(k).values
        kept.append(torch.where(part.abs() >= least, part, 0.0))
    stacked = torch.stack(kept)
    agreeing = stacked * stacked.sum(0).sign() > 0
    mean = (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    assert_close({"l.0": found}, {"l.0": ((u * s) @ mean).float()})
