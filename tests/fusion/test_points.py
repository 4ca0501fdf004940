"""Where a fusion lies in the latent space: the three rules, by their formulas."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from icm_ray.fusion_vae.orientation import oriented

NAMES = ("code", "law", "med")


@pytest.fixture(scope="module")
def known(model):
    """The model with latents and task vectors that are known, code's and law's in conflict."""
    draw = torch.Generator().manual_seed(4)
    vectors = {name: torch.randn(16, generator=draw) for name in NAMES}
    vectors["law"] = vectors["law"] - 2 * vectors["code"]
    latents = {name: torch.randn(model.vae.latent, generator=draw) for name in NAMES}
    return replace(model, vectors=vectors, latents=latents, v_scale=2.0)


def stacked(values) -> torch.Tensor:
    return torch.stack([values[name] for name in NAMES])


@pytest.mark.parametrize("temperature", [0.2, 1.0, None])
@pytest.mark.parametrize("weights", [None, {"code": 3.0, "law": 1.0, "med": 2.0}])
def test_the_mean_leans_towards_tasks_that_point_where_it_points(
    known, temperature, weights
) -> None:
    point = known.point(NAMES[::-1], weights=weights, temperature=temperature)
    vectors = stacked(known.vectors) / 2
    shares = stacked({n: torch.tensor((weights or {}).get(n, 1.0)) for n in NAMES})
    total = (shares[:, None] * oriented(vectors)).sum(0)
    length = (shares * vectors.norm(dim=1)).sum() / shares.sum()
    torch.testing.assert_close(point.v, total * (length / total.norm()))
    if temperature is not None:
        shares = shares * (cosine_similarity(vectors, point.v[None]) / temperature).exp()
    shares = shares / shares.sum()
    assert list(point.weights.values()) == pytest.approx(shares.tolist(), rel=1e-5)
    torch.testing.assert_close(point.z, shares @ stacked(known.latents))


def test_the_soup_leans_nowhere(known) -> None:
    point = known.point(NAMES, rule="soup", temperature=0.1)
    assert list(point.weights.values()) == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(point.z, stacked(known.latents).mean(0))


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_arithmetic_adds_oriented_differences_from_the_zero_adapter(known, strength) -> None:
    weights = {"code": 2.0, "law": 1.0, "med": 1.0}
    point = known.point(NAMES, weights=weights, rule="arithmetic", strength=strength)
    with torch.no_grad():
        origin = known.vae.encode(torch.zeros(1, known.layout.size), torch.zeros(1, 16))[0][0]
    shares = torch.tensor([0.5, 0.25, 0.25])
    away = oriented(stacked(known.latents) - origin)
    assert not torch.allclose(away, stacked(known.latents) - origin), "there are conflicts"
    torch.testing.assert_close(point.z, origin + strength * (shares @ away))
    assert list(point.weights.values()) == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize("rule", ["mean", "arithmetic", "soup"])
def test_a_task_of_no_weight_takes_no_part(known, rule) -> None:
    point = known.point(NAMES, weights={"code": 1.0, "law": 0.0, "med": 1.0}, rule=rule)
    without = known.point(("code", "med"), rule=rule)
    torch.testing.assert_close(point.z, without.z)
    torch.testing.assert_close(point.v, without.v)
    assert point.weights == pytest.approx({**without.weights, "law": 0.0})


def test_a_residual_is_less_what_each_task_decodes_to(known) -> None:
    point = known.point(NAMES)
    whole = known.decoded(point.z, point.v)
    torch.testing.assert_close(known.fused(point, residual=False), whole)
    own = [known.decoded(known.latents[n], known.vectors[n] / 2) for n in NAMES]
    expected = whole - sum(point.weights[n] * x for n, x in zip(NAMES, own, strict=True))
    torch.testing.assert_close(known.fused(point, residual=True), expected)
