"""Both stages: what they minimise, and that splitting the tasks changes nothing."""

import pytest
import torch

from icm_ray.errors import RecipeError
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.train import train

META = {"vae_steps": 0, "meta_steps": 4}


@pytest.mark.parametrize("loss", ["task", "entropy", "null_space_ratio", "task_vector"])
def test_p8_an_inner_step_lowers_its_loss(build, loss) -> None:
    meta = build(**META, inner={"loss": loss, "lr": 0.01, "steps": 2})
    for task in ("code", "law"):
        x = meta.table.x[meta.table.final_of(task)] * 0.5
        before = meta.inner_loss(task, 0, x, x)
        after, told = meta.adapt(task, 0, x, x)
        assert float(told) == pytest.approx(float(before))
        assert float(meta.inner_loss(task, 0, after, x)) < float(before)


def test_reconstruction_needs_no_base(build) -> None:
    meta = build(**META, inner={"loss": "reconstruction", "lr": 0.1})
    wanted = meta.table.x[0]
    after, before = meta.adapt("code", 0, wanted * 0.5, wanted)
    assert float(torch.nn.functional.mse_loss(after, wanted)) < float(before)
    alone = MetaTraining.build(meta.spec, meta.layout, meta.table, None)
    assert torch.isfinite(alone(0, ("code", "law"))["loss"])
    needing = build(**META).spec
    with pytest.raises(RecipeError, match="task_vector needs a base and inputs"):
        MetaTraining.build(needing, meta.layout, meta.table, None)


def gradient_of_inputs(meta: MetaTraining) -> torch.Tensor:
    """Gradient of the outer reconstruction by the embeddings that the inner batch reads."""
    side = meta.base_side
    assert side is not None
    words = side.model.get_input_embeddings().weight
    assert meta.losses(0, "code").reconstruction.requires_grad
    words.requires_grad_(True)
    try:
        found = meta.losses(0, "code").reconstruction
        slope = torch.autograd.grad(found, words, allow_unused=True)[0]
        return torch.zeros_like(words) if slope is None else slope
    finally:
        words.requires_grad_(False)


@pytest.mark.parametrize("strict", [False, True])
def test_p11_what_was_adapted_reaches_the_reconstruction_only_by_default(build, strict) -> None:
    meta = build(**META, strict=strict, inner={"order": 2, "lr": 0.1})
    with torch.no_grad():  # an untrained residual ignores nothing but its own zeros
        for parameter in meta.vae.parameters():
            parameter.add_(0.05)
    slope = gradient_of_inputs(meta)
    assert torch.isfinite(slope).all()
    assert bool(slope.any()) is not strict


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_decides_what_the_outer_gradient_sees(build, order) -> None:
    meta = build(**META, inner={"order": order, "lr": 0.1})
    assert bool(gradient_of_inputs(meta).any()) is (order == 2)
    values = {}
    for draw in (0, 1):  # the values of a first-order step still depend on the batch
        meta.seed = draw
        x = meta.table.x[0]
        values[draw] = meta.adapt("code", 0, x, x)[0]
    found = meta(0, ("code",))
    found["loss"].backward()
    assert all(p.grad is not None for p in meta.vae.parameters())


@pytest.mark.parametrize("stage", [{}, META, {**META, "query": 0.5, "meta_batch": 2}])
def test_any_split_of_tasks_gives_the_same(build, stage) -> None:
    whole, names = build(**stage), ("code", "law", "med")
    found = whole(0, names)
    found["loss"].backward()
    split = build(**stage)
    total = sum(split(0, (name,))["loss"] for name in reversed(names)) / 3
    total.backward()
    for one, two in zip(whole.vae.parameters(), split.vae.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-6)
    assert float(found["loss"].detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert all(not found[name].requires_grad for name in ("reconstruction", "kl", "inner", "query"))


def test_no_task_is_a_gradient_of_zeros(build) -> None:
    meta = build()
    meta(0, ())["loss"].backward()
    assert all(not p.grad.any() for p in meta.vae.parameters())


def test_only_the_network_is_trained(build) -> None:
    meta = build()
    assert {n.split(".")[0] for n, _ in meta.named_parameters()} == {"vae"}
    assert not any(p.requires_grad for p in meta.base_side.model.parameters())


def test_tasks_of_a_step_can_be_drawn(build) -> None:
    meta = build(tasks_per_step=2)
    drawn = {meta.tasks_of(step) for step in range(20)}
    assert drawn == {("code", "law"), ("code", "med"), ("law", "med")}
    assert build().tasks_of(3) == ("code", "law", "med")


def test_the_meta_stage_trains(build) -> None:
    meta = build(vae_steps=0, meta_steps=16, meta_lr=1e-2, kl_weight=0.0, vae={"preset": "paper"})
    history = train(meta)
    first, last = (sum(h["loss"] for h in part) for part in (history[:4], history[-4:]))
    assert last < 0.95 * first
    assert all(h["inner"] > 0 for h in history)


def test_the_cost_of_the_divergence_rises_and_spares_free_bits(build) -> None:
    meta = build(kl_weight=1.0, kl_warm_up=0.5, free_bits=0.25)
    kl = torch.tensor([0.1, 1.0])
    assert float(meta.kl_cost(kl, 0)) == pytest.approx(1.25 / 30)
    assert float(meta.kl_cost(kl, 59)) == pytest.approx(1.25)
