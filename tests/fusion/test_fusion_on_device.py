"""A Fusion-VAE trained on another device is the processor's, and comes back to it."""

import pytest
import torch

from icm_ray.base_model.loading import load_base
from icm_ray.base_model.placing import Place
from icm_ray.fusion.base_side import BaseSide
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion.latent import latent_plan
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.train import finished, train
from icm_ray.fusion_vae.layout import Layout
from icm_ray.learning.learner import learn


@pytest.mark.parametrize("meta_steps", [0, 2])
def test_training(
    accelerator, tiny_bert, tasks, samples, vectors, adapters, fusion_spec, meta_steps
) -> None:
    spec = fusion_spec(vae_steps=3, meta_steps=meta_steps)
    layout = Layout.fit(spec.representation, samples)

    def trained(device: str):
        side = BaseSide(load_base(tiny_bert, Place(device=device)), tasks)
        meta = MetaTraining.build(spec, layout, FusionTable.of(layout, samples, vectors), side, 0)
        meta.vae = meta.vae.to(device)
        return finished(meta, train(meta), adapters)

    here = trained("cpu")
    with accelerator.on():
        there = trained(accelerator.name)
    for name, tensor in here.tensors().items():
        found = there.tensors()[name]
        assert found.device.type == "cpu", name
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-4)


def test_in_context(accelerator, tiny_bert, tasks, model, adapters) -> None:
    plan = latent_plan(model, adapters)
    quick = plan.spec.optimisation.model_copy(update={"steps": 3})
    object.__setattr__(plan, "spec", plan.spec.model_copy(update={"optimisation": quick}))

    def learned(device: str):
        base = load_base(tiny_bert, Place(device=device))
        return learn(base.model, plan.learning(base), tasks).tensors

    here = learned("cpu")
    with accelerator.on():
        there = learned(accelerator.name)
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-3, atol=1e-4)
