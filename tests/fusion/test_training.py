"""The loop around the losses: whose gradients, how long, at which rate, and what is kept of it."""

from dataclasses import replace

import pytest
import torch

from icm_ray.checkpoint import Checkpoint
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.train import STATE, finished, learning_rate, train

STAGES = {"vae_steps": 4, "meta_steps": 3, "warm_up": 0.5, "inner": {"loss": "reconstruction"}}


@pytest.fixture
def stepped(monkeypatch):
    """Train, and return of every step the optimiser's settings and the gradients it took."""

    def record(meta: MetaTraining, check) -> list[dict]:
        plain, seen = torch.optim.AdamW.step, []

        def step(self, *words):
            (group,) = self.param_groups
            seen.append({name: group[name] for name in ("lr", "weight_decay", "betas")})
            check(len(seen) - 1, [leaf.grad.clone() for leaf in group["params"]])
            return plain(self, *words)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        train(meta)
        return seen

    return record


def fresh(meta: MetaTraining, step: int) -> list[torch.Tensor]:
    loss = meta(step, meta.tasks_of(step))["loss"]
    return list(torch.autograd.grad(loss, list(meta.vae.parameters())))


def length(slopes: list[torch.Tensor]) -> float:
    return float(torch.stack([slope.norm() for slope in slopes]).norm())


def test_every_step_takes_the_gradient_of_its_own_loss(build, stepped) -> None:
    meta = build(**STAGES, clip=1e6)

    def check(step: int, slopes: list[torch.Tensor]) -> None:
        for found, expected in zip(slopes, fresh(meta, step), strict=True):
            torch.testing.assert_close(found, expected)

    assert len(stepped(meta, check)) == 7


def test_a_gradient_is_cut_to_the_clip(build, stepped) -> None:
    meta = build(**STAGES, clip=1e-3)

    def check(step: int, slopes: list[torch.Tensor]) -> None:
        whole = fresh(meta, step)
        assert length(whole) > 1e-3
        assert length(slopes) == pytest.approx(1e-3, rel=1e-3)
        for found, expected in zip(slopes, whole, strict=True):
            torch.testing.assert_close(found, expected * (1e-3 / length(whole)), rtol=1e-3, atol=0)

    stepped(meta, check)


def test_the_optimiser_is_told_rate_and_decay(build, stepped) -> None:
    meta = build(**STAGES, lr=0.02, meta_lr=0.001, weight_decay=0.3)
    seen = stepped(meta, lambda *_: None)
    assert [one["lr"] for one in seen] == [learning_rate(meta.spec, step) for step in range(7)]
    assert {one["weight_decay"] for one in seen} == {0.3}


def test_each_stage_has_its_own_rise_and_fall(build) -> None:
    spec = build(vae_steps=6, meta_steps=4, warm_up=0.5, lr=1.0, meta_lr=0.1).spec
    rates = [learning_rate(spec, step) for step in range(10)]
    assert rates == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 1.0, 0.75, 0.25, 0.05, 0.1, 0.1, 0.05]  # half cosines after the rise
    )
    level = spec.model_copy(update={"warm_up": 0.0})
    assert learning_rate(level, 0) == 1.0
    assert learning_rate(level, 6) == 0.1


def test_what_is_kept_is_of_the_finished_adapters(build, adapters) -> None:
    meta = build(**STAGES, kl_weight=1e-3)
    with torch.no_grad():
        for parameter in meta.vae.parameters():
            parameter.add_(0.1)
    model, table = finished(meta, [], adapters), meta.table
    for adapter in adapters:
        (row,) = [i for i in table.rows_of(adapter.name) if table.steps[i] == 5]
        x, v = table.x[row][None], table.v[row][None] / float(table.v.square().mean()) ** 0.5
        assert torch.equal(model.latents[adapter.name], model.vae.encode(x, v)[0][0])
        assert torch.equal(model.vectors[adapter.name], table.v[row])
        assert model.adapters[adapter.name] == adapter.fingerprint
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())


@pytest.mark.parametrize("which", ["own", "shuffled", "none"])
def test_the_report_says_which_task_vectors_the_network_was_told(build, adapters, which) -> None:
    meta = build(representation={"task_vectors": which})
    assert finished(meta, [], adapters).report["task_vectors"] == which


def test_vectors_of_nothing_have_a_scale(build) -> None:
    meta = build()
    silent = replace(meta.table, v=torch.zeros_like(meta.table.v))
    again = MetaTraining.build(meta.spec, meta.layout, silent, meta.base_side)
    assert again.v_scale == 1.0
    assert bool(torch.isfinite(again(0, ("law",))["loss"]))


def test_another_run_s_state_is_left_aside(build, tmp_path) -> None:
    seen: list[int] = []
    for key in ("k", "k", "other"):
        options = {"progress": lambda step, _loss: seen.append(step)}
        state = Checkpoint(tmp_path / STATE, key)
        train(build(**STAGES, save_every=7), checkpoint=state, **options)
    assert seen == [*range(1, 8), *range(1, 8)], "the second run found the first one done"


def test_kernels_have_the_threads_they_are_given(build) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()

    def look(_step: int, _loss: float) -> None:
        seen.append(torch.get_num_threads())

    for threads in (2, 3):
        meta = build(**{**STAGES, "vae_steps": 1, "meta_steps": 0})
        train(meta, threads=threads, progress=look)
    assert seen == [2, 3]
    assert torch.get_num_threads() == before


def test_the_seed_draws_the_weights(build) -> None:
    one, other = (build(seed).vae.state_dict() for seed in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)
