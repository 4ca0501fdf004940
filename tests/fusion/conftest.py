"""Three tasks on the tiny BERT with trajectories of different ranks, and a short Fusion-VAE."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from icm_ray.base_model.loading import Base, load_base
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.config import FusionSpec
from icm_ray.evaluation.heads import Head
from icm_ray.fusion.base_side import BaseSide
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.train import finished, train
from icm_ray.fusion_vae.layout import Layout, Sample
from icm_ray.fusion_vae.model import FusionModel
from icm_ray.learning.inputs import TaskInputs
from icm_ray.types import Adapter, LoRAFactors

PARTS = ("self.query", "self.value", "output.dense")
MODULES = {f"encoder.layer.{i}.attention.{part}": (16, 16) for i in (0, 1) for part in PARTS}
RANKS = {"code": 2, "law": 3, "med": 2}


@pytest.fixture(scope="session")
def tiny(tiny_bert) -> Base:
    return load_base(tiny_bert)


@pytest.fixture(scope="session")
def adapters(make_adapter) -> list[Adapter]:
    return [make_adapter(t, shapes=MODULES, rank=r, spread=0.4) for t, r in RANKS.items()]


def trajectory(adapter: Adapter, steps: int = 5) -> list[Sample]:
    """Checkpoints on the way to an adapter, and the adapter."""
    draw = torch.Generator().manual_seed(len(adapter.name))
    samples = []
    for step in range(1, steps):
        rest = 1 - step / steps
        modules = {
            m: LoRAFactors(
                f.a + 0.1 * rest * torch.randn(f.a.shape, generator=draw), f.b * (1 - rest / 2)
            )
            for m, f in adapter.modules.items()
        }
        samples.append(Sample(adapter.name, step, modules))
    return [*samples, Sample(adapter.name, steps, adapter.modules, is_final=True)]


@pytest.fixture(scope="session")
def samples(adapters) -> list[Sample]:
    return [sample for adapter in adapters for sample in trajectory(adapter)]


@pytest.fixture(scope="session")
def vectors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {t: torch.randn(16, generator=draw) for t in RANKS}


@pytest.fixture(scope="session")
def tasks(tiny, adapters, texts) -> list[TaskInputs]:
    """Eight labelled texts each; two classifications and a regression."""
    made = []
    for number, adapter in enumerate(adapters):
        own = texts[number * 8 : number * 8 + 8]
        batches = make_batches(tokenize(tiny.tokenizer, own, 16), 4, 0)
        draw = torch.Generator().manual_seed(number)
        outputs = 1 if adapter.name == "med" else 4
        weight = torch.randn(outputs, 16, generator=draw)
        head = Head(weight, torch.randn(outputs, generator=draw))
        kind = "regression" if adapter.name == "med" else "classification"
        targets = torch.arange(8.0) % 4 if outputs == 4 else torch.linspace(-1, 1, 8)
        made.append(TaskInputs(adapter, batches, head, kind, targets))
    return made


SMALL: dict[str, Any] = {
    "representation": {"components": 8},
    "vae": {"latent": 5, "hidden": 16},
    "vae_steps": 60,
    "meta_steps": 0,
    "batch": 6,
    "lr": 3e-3,
}


def spec_of(**changes: Any) -> FusionSpec:
    """The small recipe with changes; parts are merged."""
    plain = {**SMALL}
    for name, value in changes.items():
        plain[name] = {**plain.get(name, {}), **value} if isinstance(value, dict) else value
    return FusionSpec.model_validate(plain)


@pytest.fixture(scope="session")
def fusion_spec() -> Callable[..., FusionSpec]:
    return spec_of


@pytest.fixture(scope="session")
def build(samples, vectors, tiny, tasks) -> Callable[..., MetaTraining]:
    """A training with changes to the small recipe."""

    def make(seed: int = 0, **changes: Any) -> MetaTraining:
        spec = spec_of(**changes)
        layout = Layout.fit(spec.representation, samples)
        side = BaseSide(tiny, tasks)
        return MetaTraining.build(
            spec, layout, FusionTable.of(layout, samples, vectors), side, seed
        )

    return make


@pytest.fixture(scope="session")
def untrained(build, adapters) -> FusionModel:
    return finished(build(), [], adapters)


@pytest.fixture(scope="session")
def model(build, adapters) -> FusionModel:
    meta = build()
    return finished(meta, train(meta), adapters)
