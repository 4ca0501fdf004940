"""Adapters as vectors: exact inverses, shared bases, smooth trajectories, no order anywhere."""

import pytest
import torch

from icm_ray.config import RepresentationSpec, VAESpec
from icm_ray.errors import InputError, RecipeError
from icm_ray.fusion_vae.gauge import balanced
from icm_ray.fusion_vae.layout import Layout, Sample, cosine, distance, factors_of, norm
from icm_ray.fusion_vae.network import build_vae, divergence
from icm_ray.fusion_vae.orientation import fused_direction, leanings, oriented
from icm_ray.types import LoRAFactors

SHAPES = {"a.0.q": (12, 10), "a.0.v": (6, 10), "a.1.q": (12, 10)}
GAUGES = ("core", "balanced", "raw")


@pytest.fixture(scope="module")
def samples(make_adapter) -> list[Sample]:
    """Three tasks of ranks 1 to 3 with four checkpoints each; one lacks a module."""
    made = []
    for rank, task in enumerate("xyz", 1):
        modules = dict(make_adapter(task, shapes=SHAPES, rank=rank).modules)
        if task == "y":
            del modules["a.0.v"]
        for step in range(4):
            late = {m: LoRAFactors(f.a, f.b * (0.7 + 0.1 * step)) for m, f in modules.items()}
            made.append(Sample(task, step, modules if step == 3 else late, step == 3))
    return made


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("components", [None, 5, 1])
def test_finals_come_back_exactly(samples, gauge, components) -> None:
    layout = Layout.fit(RepresentationSpec(gauge=gauge, components=components), samples)
    assert layout.size == sum(layout.sizes)
    for sample in samples:
        if sample.is_final:
            assert layout.error(sample.modules, layout.encode(sample.modules)) < 1e-5
    if components:
        assert max(layout.sizes) <= max(components, 3), "a direction each final has, at least"
    again = Layout.restored(layout.described(), layout.tensors())
    x = layout.encode(samples[0].modules)
    assert torch.equal(again.encode(samples[0].modules), x)
    assert distance(again.decode(x), layout.decode(x)) < 1e-6


@pytest.mark.parametrize("gauge", ["core", "balanced"])
def test_how_a_delta_is_split_is_nothing(samples, gauge) -> None:
    layout = Layout.fit(RepresentationSpec(gauge=gauge), samples)
    turn = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [2.0, 0.0, 1.0]])
    modules = next(s for s in samples if s.task == "z" and s.is_final).modules
    turned = {m: LoRAFactors(turn @ f.a, f.b @ torch.linalg.inv(turn)) for m, f in modules.items()}
    assert torch.allclose(layout.encode(turned), layout.encode(modules), atol=1e-4)


def test_vectors_have_unit_mean_square(samples) -> None:
    layout = Layout.fit(RepresentationSpec(), samples)
    x = torch.stack([layout.encode(s.modules) for s in samples])
    for share in x.split(list(layout.sizes), 1):
        assert float(share.square().mean()) == pytest.approx(1, rel=1e-4)


def test_decoding_has_a_gradient(samples) -> None:
    for gauge in GAUGES:
        layout = Layout.fit(RepresentationSpec(gauge=gauge), samples)
        x = layout.encode(samples[3].modules).requires_grad_()
        total = sum(
            (part.left * part.core if part.core.ndim == 1 else part.left @ part.core).sum()
            for part in layout.parts(x).values()
        )
        assert bool(torch.autograd.grad(total, x)[0].any())
        plain = layout.decode(x)
        assert norm(plain) > 0
        assert {m: factors_of(p).shape for m, p in layout.parts(x.detach()).items()} == {
            m.path: m.shape for m in layout.modules
        }


def test_a_neighbour_fixes_order_and_signs() -> None:
    draw = torch.Generator().manual_seed(0)
    one = balanced(
        LoRAFactors(torch.randn(3, 8, generator=draw), torch.randn(9, 3, generator=draw))
    )
    swapped = LoRAFactors(-one.a[[2, 0, 1]], -one.b[:, [2, 0, 1]] * 1.01)
    found = balanced(swapped, like=one)
    assert float((found.a - one.a).norm()) < 0.02 * float(one.a.norm())
    assert torch.allclose(found.delta(), swapped.delta(), atol=1e-5)


def test_what_does_not_fit_is_refused(samples, make_adapter) -> None:
    layout = Layout.fit(RepresentationSpec(gauge="raw"), samples)
    strange = make_adapter("s", shapes={"a.0.q": (12, 10), "b": (3, 3)}, rank=4).modules
    with pytest.raises(InputError) as caught:
        layout.encode(strange)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "module a.0.q",
        "module b",
    ]
    with pytest.raises(InputError, match="no final adapter"):
        Layout.fit(RepresentationSpec(), samples[:3])
    with pytest.raises(InputError, match="a convolution"):
        Layout.fit(RepresentationSpec(), samples, {"a.0.q": "conv:3x3"})


@pytest.mark.parametrize("preset", ["default", "conv", "paper"])
def test_parameters_do_not_grow_with_d(preset) -> None:
    spec = VAESpec(preset=preset, latent=8, hidden=16)
    sizes = {D: [4000] * (D // 4000) for D in (400_000, 1_600_000)}
    counts = {
        D: sum(p.numel() for p in build_vae(spec, s, 16).parameters()) for D, s in sizes.items()
    }
    assert len(set(counts.values())) == 1
    vae = build_vae(spec, [7, 5, 9], 16)
    x, v = torch.randn(3, 21), torch.randn(3, 16)
    mean, logvar = vae.encode(x, v)
    assert vae.decode(mean, v).shape == x.shape
    assert divergence(mean, logvar).shape == (vae.latent,)
    one = vae(x[:1], v[:1])
    assert torch.allclose(vae(x, v)[:1], one, atol=1e-5), "no example knows of its batch"


def test_a_module_too_wide_for_a_token_is_refused() -> None:
    with pytest.raises(RecipeError, match="largest module has 5000 numbers"):
        build_vae(VAESpec(), [5000], 4)


def test_the_divergence_is_that_of_torch() -> None:
    mean, logvar = torch.randn(4, 3), torch.randn(4, 3)
    one = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0)).mean(0)
    assert torch.allclose(divergence(mean, logvar), expected, atol=1e-6)


def test_oriented_vectors_point_against_none() -> None:
    draw = torch.Generator().manual_seed(3)
    vectors = torch.randn(5, 4, generator=draw)
    found = oriented(vectors)
    products = found @ vectors.T
    assert bool((products[~torch.eye(5, dtype=torch.bool)] > -1e-5).all())
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(oriented(vectors[order]), found[order], atol=1e-5)
    # Two vectors: the projection of PCGrad.
    u, w = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    assert torch.allclose(oriented(torch.stack([u, w])), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    friends = torch.eye(3)
    assert torch.equal(oriented(friends), friends)


def test_direction_and_leanings() -> None:
    shares = torch.ones(2)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert not fused_direction(opposite, shares).any()
    vectors = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    direction = fused_direction(vectors, shares)
    assert float(direction.norm()) == pytest.approx(2)
    assert leanings(vectors, direction, shares, 1.0).tolist() == pytest.approx([0.5, 0.5])
    leaning = leanings(vectors, vectors[0], shares, 0.5)
    assert leaning[0] > leaning[1] > 0
    assert leanings(vectors, vectors[0], torch.tensor([1.0, 3.0]), None).tolist() == [0.25, 0.75]


def test_angles_and_lengths_of_adapters(make_adapter) -> None:
    one, two = (make_adapter(t, shapes=SHAPES).modules for t in ("one", "two"))
    flat = [torch.cat([m.delta().flatten() for m in x.values()]) for x in (one, two)]
    assert norm(one) == pytest.approx(float(flat[0].norm()), rel=1e-5)
    assert distance(one, two) == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-5)
    expected = float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))
    assert cosine(one, two) == pytest.approx(expected, abs=1e-5)
