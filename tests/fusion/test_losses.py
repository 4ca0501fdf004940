"""A step of either stage to the letter: what is drawn, decoded, adapted, encoded again and paid."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from icm_ray.fusion.meta import PARTS, MetaTraining

ALONE = {"vae_steps": 20, "meta_steps": 0, "kl_weight": 0.5, "kl_warm_up": 0.5, "free_bits": 1.8}
META = {**ALONE, "vae_steps": 0, "meta_steps": 20, "kl_warm_up": 0.0, "meta_batch": 3}
RECONSTRUCTION = {"loss": "reconstruction", "lr": 0.1}


@dataclass
class Seen:
    """What a network was shown, and what it said, call after call."""

    encoded: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]] = field(default_factory=list)
    decoded: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def noise(self, decoding: int, encoding: int) -> Tensor:
        """The draw behind a decoded z, in deviations of the posterior that it is from."""
        mean, logvar = self.encoded[encoding][2]
        return ((self.decoded[decoding][0] - mean) / (0.5 * logvar).exp()).detach()


@pytest.fixture
def watch(build, monkeypatch):
    """Return a training with weights away from their start, and what its network sees."""

    def make(seed: int = 0, **changes) -> tuple[MetaTraining, Seen]:
        meta, seen = build(seed, **changes), Seen()
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in meta.vae.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        encode, decode = meta.vae.encode, meta.vae.decode

        def encoding(x: Tensor, v: Tensor):
            seen.encoded.append((x, v, encode(x, v)))
            return seen.encoded[-1][2]

        def decoding(z: Tensor, v: Tensor) -> Tensor:
            seen.decoded.append((z, v, decode(z, v)))
            return seen.decoded[-1][2]

        monkeypatch.setattr(meta.vae, "encode", encoding)
        monkeypatch.setattr(meta.vae, "decode", decoding)
        return meta, seen

    return make


def divergences(posterior: tuple[Tensor, Tensor]) -> Tensor:
    """KL from the unit normal by latent dimension, as torch has it."""
    mean, logvar = posterior
    own = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0))
    return kl.mean(0).detach()


def cost(posterior: tuple[Tensor, Tensor], share: float = 1.0) -> Tensor:
    """What a posterior pays: 1.8 nats of each dimension are free, the rest costs half."""
    return share * 0.5 * divergences(posterior).clamp(min=1.8).sum()


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (4, 0.5), (9, 1.0), (19, 1.0)])
def test_the_first_stage_minimises_reconstruction_and_divergence(watch, step, share) -> None:
    meta, seen = watch(**ALONE)
    found = meta.losses(step, "law")
    ((x, v, posterior),), ((_, told, made),) = seen.encoded, seen.decoded
    assert torch.equal(v, told)
    assert float(divergences(posterior).min()) < 1.8 < float(divergences(posterior).max())
    torch.testing.assert_close(found.reconstruction, (made - x).square().mean())
    torch.testing.assert_close(found.kl, divergences(posterior).sum())
    torch.testing.assert_close(found.cost, cost(posterior, share))
    torch.testing.assert_close(found.total, found.reconstruction + found.cost)
    assert float(found.query) == float(found.inner) == 0


def test_a_draw_is_normal_and_of_its_seed_its_step_and_its_task(watch) -> None:
    def noise(seed: int = 0, step: int = 0, task: str = "law", batch: int = 40) -> Tensor:
        meta, seen = watch(seed, **{**ALONE, "batch": batch})
        meta.losses(step, task)
        return seen.noise(0, 0)

    plain = noise()
    assert abs(float(plain.mean())) < 0.1
    assert float(plain.std()) == pytest.approx(1, abs=0.1)
    assert float(plain.std(0).min()) > 0.5, "each row has its own"
    torch.testing.assert_close(noise(), plain)
    for other in (noise(seed=1), noise(step=1), noise(task="med")):
        assert float((other - plain).abs().mean()) > 0.5


def test_without_mixtures_a_batch_is_the_task_s_own_checkpoints(watch) -> None:
    meta, seen = watch(**{**ALONE, "mixtures": 0.0, "batch": 7})
    unit = float(meta.table.v.square().mean()) ** 0.5
    for step in range(4):
        meta.losses(step, "law")
    rows = meta.table.rows_of("law")
    own, told = meta.table.x[rows], meta.table.v[rows[:1]] / unit
    for x, v, _ in seen.encoded:
        assert len(x) == 7
        torch.testing.assert_close(v, told.expand(7, -1))
        assert all(bool((row == own).all(1).any()) for row in x)
    everything = torch.cat([x for x, _, _ in seen.encoded])
    assert all(bool((row == everything).all(1).any()) for row in own), "none is left out"


def test_mixtures_mix_checkpoints_and_task_vectors_alike(watch) -> None:
    meta, seen = watch(**{**ALONE, "mixtures": 0.75, "batch": 80})
    table = meta.table
    meta.losses(0, "law")
    x, v, _ = seen.encoded[0]
    own, told = table.x[table.rows_of("law")], table.v[table.rows_of("law")[0]] / meta.v_scale
    assert all(bool((row == own).all(1).any()) for row in x[:20])
    assert bool((v[:20] == told).all())
    by_task = torch.stack([table.v[table.final_of(name)] for name in table.names]) / meta.v_scale
    shares = torch.linalg.lstsq(by_task.T, v[20:].T).solution.T
    torch.testing.assert_close(shares @ by_task, v[20:], rtol=1e-4, atol=1e-4)
    choices = torch.tensor(list(itertools.product(*(table.rows_of(name) for name in table.names))))
    mixed = torch.einsum("mk,ckd->mcd", shares, table.x[choices])
    gaps = (mixed - x[20:, None]).norm(dim=-1)
    assert float((gaps.min(1).values / x[20:].norm(dim=-1)).max()) < 1e-4
    assert len(set(gaps.argmin(1).tolist())) > 20, "any checkpoints of the tasks"
    # Uniform over the simplex, times anything up to one and a half.
    totals = shares.sum(1, keepdim=True)
    assert float(shares.min()) > -1e-4
    assert 0 < float(totals.min()) < 0.3
    assert 1.2 < float(totals.max()) < 1.5001
    assert (shares / totals).mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.1)
    assert (shares / totals).var(0).tolist() == pytest.approx([1 / 18] * 3, abs=0.02)


def test_a_task_alone_has_nothing_to_mix_with(watch) -> None:
    meta, seen = watch(**{**ALONE, "mixtures": 1.0})
    meta.rows = {"law": meta.rows["law"]}
    meta.losses(0, "law")
    own = meta.table.x[meta.table.rows_of("law")]
    assert all(bool((row == own).all(1).any()) for row in seen.encoded[0][0])


@pytest.mark.parametrize("strict", [False, True])
def test_the_meta_stage_is_algorithm_1(watch, strict) -> None:
    meta, seen = watch(**META, strict=strict, inner={**RECONSTRUCTION, "steps": 2})
    found = meta.losses(7, "law")
    (x, v, first), (adapted, _, second) = seen.encoded
    assert len(x) == 3
    assert all(torch.equal(told, v) for _, told, _ in (seen.encoded[1], *seen.decoded))
    torch.testing.assert_close(v[0], meta.table.v[meta.table.rows_of("law")[0]] / meta.v_scale)
    decoded = seen.decoded[0][2]
    expected = [meta.adapt("law", 7, one, own)[0] for one, own in zip(decoded, x, strict=True)]
    torch.testing.assert_close(adapted, torch.stack(expected))
    before = torch.stack([mse_loss(one, own) for one, own in zip(decoded, x, strict=True)])
    torch.testing.assert_close(found.inner, before.mean())
    assert len(seen.decoded) == (1 if strict else 2)
    torch.testing.assert_close(found.reconstruction, (seen.decoded[-1][2] - x).square().mean())
    paid = [second] if strict else [first, second]
    torch.testing.assert_close(found.kl, sum(divergences(one).sum() for one in paid))
    torch.testing.assert_close(found.cost, sum(cost(one) for one in paid))
    torch.testing.assert_close(found.total, found.reconstruction + found.cost)
    draws = [seen.noise(0, 0)] if strict else [seen.noise(0, 0), seen.noise(1, 1)]
    assert all(float(draw.abs().mean()) > 0.4 for draw in draws)
    assert strict or float((draws[0] - draws[1]).abs().mean()) > 0.4


def test_the_stages_meet_where_the_recipe_says(watch) -> None:
    meta, seen = watch(**{**ALONE, "vae_steps": 3, "meta_steps": 3}, inner=RECONSTRUCTION)
    assert [float(meta.losses(step, "law").inner) > 0 for step in (2, 3)] == [False, True]
    assert [len(x) for x, _, _ in seen.encoded] == [meta.spec.batch, 1, 1]


def test_the_query_asks_what_was_encoded_again_on_new_inputs(watch, monkeypatch) -> None:
    meta, seen = watch(**META, query=0.25, inner={"steps": 1})
    asked: list[tuple[Tensor, bool, Tensor]] = []
    plain = meta.inner_loss

    def asking(task: str, step: int, x: Tensor, wanted: Tensor, *, new: bool = False) -> Tensor:
        asked.append((x, new, plain(task, step, x, wanted, new=new)))
        return asked[-1][2]

    monkeypatch.setattr(meta, "inner_loss", asking)
    found = meta.losses(2, "law")
    queries = [(x, loss) for x, new, loss in asked if new]
    assert torch.equal(torch.stack([x for x, _ in queries]), seen.decoded[1][2])
    torch.testing.assert_close(found.query, 0.25 * torch.stack([q for _, q in queries]).mean())
    torch.testing.assert_close(found.total, found.reconstruction + found.cost + found.query)
    assert bool(found.query > 0)


def test_a_task_that_the_inner_loss_is_silent_about_reconstructs(build) -> None:
    meta = build(**META, inner={"loss": "entropy"})
    x, wanted = meta.table.x[0], meta.table.x[7]
    found = {task: float(meta.inner_loss(task, 0, x, wanted)) for task in ("law", "med")}
    assert found["med"] == float(mse_loss(x, wanted)), "a regression has no entropy"
    assert found["law"] != found["med"]


def by_hand(x: Tensor, wanted: Tensor, steps: int, lr: float, relative: bool) -> Tensor:
    """Descend on the mean square from `wanted`, whose gradient is 2 (x - wanted) / D."""
    for _ in range(steps):
        slope = 2 * (x - wanted) / len(x)
        x = x - lr * (float(x.norm() / slope.norm()) if relative else 1.0) * slope
    return x


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_inner_steps_are_those_of_eq_8(build, steps, relative, order) -> None:
    lr = 0.2 if relative else 3.0
    inner = {"loss": "reconstruction", "steps": steps, "lr": lr, "relative": relative}
    meta = build(**META, inner={**inner, "order": order})
    wanted, x = meta.table.x[0], meta.table.x[7]
    after, before = meta.adapt("code", 0, x, wanted)
    torch.testing.assert_close(after, by_hand(x, wanted, steps, lr, relative))
    torch.testing.assert_close(before, mse_loss(x, wanted))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_decides_how_a_step_is_differentiated(build, order, steps) -> None:
    inner = {"loss": "reconstruction", "steps": steps, "lr": 3.0, "relative": False}
    meta = build(**META, inner={**inner, "order": order})
    x = meta.table.x[7].clone().requires_grad_()
    after, _ = meta.adapt("code", 0, x, meta.table.x[0])
    (slope,) = torch.autograd.grad(after.sum(), x)
    # The gradient of a step is a constant in the first order, and 1 - 2 lr / D in the second.
    expected = (1 - 2 * 3.0 / len(x)) ** steps if order == 2 else 1.0
    torch.testing.assert_close(slope, torch.full_like(x, expected))


@pytest.mark.parametrize("stage", [ALONE, {**META, "inner": RECONSTRUCTION, "query": 0.5}])
def test_a_step_s_loss_and_its_parts_are_means_over_the_tasks(watch, stage) -> None:
    meta, _ = watch(**stage)
    names = ("code", "law", "med")
    each = [meta.losses(3, name) for name in names]
    found = meta(3, names)
    torch.testing.assert_close(found["loss"], sum(one.total for one in each) / 3)
    for part in PARTS:
        torch.testing.assert_close(found[part], sum(getattr(one, part) for one in each) / 3)
