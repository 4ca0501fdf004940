"""Both stages: what they minimise, and that splitting the tasks changes nothing."""

from dataclasses import replace

import pytest
import torch

from icm_ray.base_model.loading import load_base
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.errors import RecipeError
from icm_ray.fusion.base_side import BaseSide
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.train import train
from icm_ray.fusion_vae.layout import Layout, Sample
from icm_ray.learning.inputs import TaskInputs

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


def test_p8_a_language_model_s_texts_are_its_labels(build, tiny_llama, make_adapter, texts) -> None:
    base = load_base(tiny_llama)
    adapter = make_adapter("code", shapes={"layers.0.self_attn.q_proj": (16, 16)}, spread=0.6)
    batches = make_batches(tokenize(base.tokenizer, texts[:8], 16), 4, 0)
    side = BaseSide(base, [TaskInputs(adapter, batches, kind="language_modelling")])
    samples = [Sample("code", 1, adapter.modules, is_final=True)]
    spec = build(**META, inner={"loss": "task", "lr": 0.01}).spec
    layout = Layout.fit(spec.representation, samples)
    table = FusionTable.of(layout, samples, {"code": torch.ones(16)})
    meta = MetaTraining.build(spec, layout, table, side)
    after, before = meta.adapt("code", 0, table.x[0], table.x[0])
    assert float(meta.inner_loss("code", 0, after, table.x[0])) < float(before)


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
    meta(0, ("code",))["loss"].backward()
    assert all(p.grad is not None for p in meta.vae.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_p11_the_inner_batch_moves_the_outer_gradient_only_by_default(build, strict) -> None:
    # Of first order, as it comes: the step is a constant in the gradient, but not the same one.
    meta = build(**META, strict=strict, kl_weight=0.0)
    with torch.no_grad():
        for parameter in meta.vae.parameters():
            parameter.add_(0.05)
    side = meta.base_side
    assert side is not None
    outer = []
    both = side.tasks["code"].batches
    for batch in both[:2]:
        side.tasks["code"] = replace(side.tasks["code"], batches=[batch])
        side.kept.clear()
        meta.vae.zero_grad()
        meta.losses(0, "code").total.backward()
        outer.append(torch.cat([p.grad.flatten() for p in meta.vae.parameters()]))
    apart = float((outer[0] - outer[1]).norm() / outer[0].norm())
    assert apart == 0 if strict else apart > 1e-4


def test_the_query_sees_new_inputs(build, tasks) -> None:
    meta = build(**META, query=0.5)
    side = meta.base_side
    assert side is not None
    x = meta.table.x[0]
    for step in range(5):
        own, new = (meta.inner_loss("code", step, x, x, new=new) for new in (False, True))
        assert float(own) != float(new)
        assert float(meta.inner_loss("code", step, x, x)) == float(own)
    single = [replace(task, batches=task.batches[:1]) for task in tasks]
    with pytest.raises(RecipeError, match="query: code, law, med: one batch but two"):
        MetaTraining.build(meta.spec, meta.layout, meta.table, BaseSide(side.base, single))


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
