"""F3: the latent and then the LoRA adapt to inputs, resume, and merge as what was learned."""

import itertools

import pytest
import torch
from learning_samples import merged_factors

import icm_ray
from icm_ray.config import ObjectiveSpec
from icm_ray.errors import InputError, RecipeError
from icm_ray.evidence.learned import save_learned
from icm_ray.fusion.diagnosis import soup
from icm_ray.fusion.latent import (
    DIRECT,
    IN_CONTEXT,
    Adaptation,
    fuse_in_context,
    latent_plan,
)
from icm_ray.fusion_vae.layout import distance, norm
from icm_ray.learning.parameters import Parameters


def short(spec, steps):
    return spec.model_copy(
        update={"optimisation": spec.optimisation.model_copy(update={"steps": steps})}
    )


QUICK = {"latent": short(IN_CONTEXT, 8), "direct": short(DIRECT, 6)}


@pytest.fixture(scope="module")
def fused(tiny, tasks, model):
    return fuse_in_context(tiny, tasks, model, Adaptation(**QUICK))


def test_it_starts_at_the_average(model, adapters) -> None:
    parameters = latent_plan(model, adapters).parameters()
    assert isinstance(parameters, Parameters)
    average = soup(
        [a.modules for a in adapters],
        [model.point(list(model.tasks)).weights[a.name] for a in adapters],
    )
    merged = merged_factors(parameters)
    bent = model.fused(model.point(list(model.tasks)), residual=True)
    expected = norm(model.layout.decode(bent))
    assert distance(merged, average) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_start_is_the_same_in_any_order_of_the_adapters(model, adapters) -> None:
    starts = [
        latent_plan(model, [adapters[i] for i in order]).constant
        for order in itertools.permutations(range(len(adapters)))
    ]
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_losses_fall_in_both_stages(fused) -> None:
    for report in (fused.report["latent"], fused.report):
        start, end = (
            sum(t[when][0] for t in report["losses"].values()) for when in ("start", "end")
        )
        assert end < start
    ends = [t["end"][0] for t in fused.report["latent"]["losses"].values()]
    starts = [t["start"][0] for t in fused.report["losses"].values()]
    assert starts == pytest.approx(ends, rel=1e-4), "the second stage goes on where the first ended"


def test_the_method_reads_it(fused, adapters, tmp_path) -> None:
    save_learned(fused, tmp_path / "fused")
    merged = icm_ray.merge(adapters, "icm_fusion", evidence=tmp_path / "fused").adapter
    for module, factors in merged.modules.items():
        expected = (
            fused.tensors[f"{module}.left"]
            @ fused.tensors[f"{module}.core"]
            @ fused.tensors[f"{module}.right"]
        )
        assert torch.allclose(factors.delta(), expected, atol=1e-5)
    with pytest.raises(InputError, match="learned with med too"):
        icm_ray.merge(adapters[:2], "icm_fusion", evidence=tmp_path / "fused")


def test_a_killed_run_continues_to_the_same_bytes(tiny, tasks, model, fused, tmp_path) -> None:
    from icm_ray.learning.learner import Run

    class Killed(Exception):
        pass

    def kill(step: int, _loss: float) -> None:
        if step == 5:
            raise Killed

    stages = {
        name: spec.model_copy(
            update={"optimisation": spec.optimisation.model_copy(update={"save_every": 2})}
        )
        for name, spec in QUICK.items()
    }
    how, run = Adaptation(**stages), Run(scratch=tmp_path, key="k")
    with pytest.raises(Killed):
        fuse_in_context(tiny, tasks, model, how, run=run, progress=kill)
    seen: list[int] = []
    again = fuse_in_context(
        tiny, tasks, model, how, run=run, progress=lambda step, _loss: seen.append(step)
    )
    assert seen[0] == 5
    assert all(torch.equal(again.tensors[n], t) for n, t in fused.tensors.items())


def test_a_merge_may_lie_beneath(tiny, tasks, model, adapters, tmp_path) -> None:
    beneath = dict(soup([a.modules for a in adapters]))
    start = latent_plan(model, adapters, beneath=beneath).parameters()
    merged = merged_factors(start)
    assert distance(merged, beneath) <= 1e-4 * norm(beneath)
    how = Adaptation(QUICK["latent"], None, beneath=beneath)
    found = fuse_in_context(tiny, tasks, model, how)
    save_learned(found, tmp_path / "fused")
    result = icm_ray.merge(adapters, "icm_fusion", evidence=tmp_path / "fused").adapter
    assert 0 < distance(result.modules, beneath) < norm(beneath)
    for module, factors in result.modules.items():
        left, core, right, a, b = (
            found.tensors[f"{module}.{end}"]
            for end in ("left", "core", "right", "residual_a", "residual_b")
        )
        torch.testing.assert_close(factors.delta(), left @ core @ right + b @ a, atol=1e-5, rtol=0)


def test_a_latent_can_distil(tiny, tasks, model, fused) -> None:
    changes = {"objective": ObjectiveSpec(kind="distillation")}
    how = {name: spec.model_copy(update=changes) for name, spec in QUICK.items()}
    found = fuse_in_context(tiny, tasks, model, Adaptation(**how))
    losses = found.report["losses"].values()
    assert sum(t["end"][0] for t in losses) < sum(t["start"][0] for t in losses)
    assert found.origin["direct"]["objective"]["kind"] == "distillation"
    assert any(not torch.equal(found.tensors[name], t) for name, t in fused.tensors.items())


@pytest.mark.parametrize("gauge", ["raw", "balanced"])
def test_factors_cannot_leave_a_merge_beneath(build, adapters, gauge) -> None:
    from icm_ray.fusion.train import finished

    model = finished(build(representation={"gauge": gauge}), [], adapters)
    beneath = dict(soup([a.modules for a in adapters]))
    with pytest.raises(RecipeError, match=f"in gauge {gauge} but one in gauge core"):
        latent_plan(model, adapters, beneath=beneath)


@pytest.mark.parametrize("gauge", ["raw", "balanced"])
def test_gauges_of_factors_adapt_too(tiny, tasks, build, adapters, gauge) -> None:
    from icm_ray.fusion.train import finished

    changes = {"representation": {"gauge": gauge}, "vae": {"preset": "default"}}
    model = finished(build(**changes), [], adapters)
    found = fuse_in_context(tiny, tasks, model, Adaptation(**QUICK))
    losses = found.report["losses"].values()
    assert sum(t["end"][0] for t in losses) < sum(t["start"][0] for t in losses)
