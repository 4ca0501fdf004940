"""What a training step of a Fusion-VAE costs an adapter, beside the predecessor's network."""

import statistics
import time
from dataclasses import dataclass

import torch

from icm_ray.benchmarks.memory import PeakMemory, random_adapter
from icm_ray.config import FusionBenchmark, FusionSpec, RepresentationSpec, VAESpec
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.train import optimizer_of
from icm_ray.fusion_vae.layout import Layout, Sample
from icm_ray.seeding import generator
from icm_ray.types import Adapter, LoRAFactors

TASKS, CHECKPOINTS, V = 6, 4, 384
"""Trajectories of a few checkpoints; a step costs the same with more of them."""
FACTORS = FusionSpec(
    representation=RepresentationSpec(gauge="raw", components=None),
    meta_steps=0,
    batch=2,
    mixtures=0.0,
    tasks_per_step=1,
)
SIDES = {
    "default": FusionSpec(meta_steps=0),
    "paper": FACTORS.model_copy(update={"vae": VAESpec(preset="paper", latent=256)}),
    "conv": FACTORS.model_copy(update={"vae": VAESpec(preset="conv", latent=256, hidden=256)}),
}
"""As `jobs.train_fusion` runs it; and on all numbers of the factors, two adapters a step, as the
predecessor does."""


@dataclass(frozen=True)
class FusionRow:
    """One network at one size.

    Attributes:
        label: Of the comparison.
        preset: Which network.
        numbers: LoRA parameters of an adapter.
        size: Numbers the network sees of it.
        parameters: Of the network.
        layout_seconds: Bases and principal directions, once.
        seconds: Of a step, over the adapters in it; median.
        peak_bytes: Resident memory above the adapters' own, bases and step; None if unknown.
        goal: What is asked of the ratio.
    """

    label: str
    preset: str
    numbers: int
    size: int
    parameters: int
    layout_seconds: float
    seconds: float
    peak_bytes: int | None
    goal: str


def measure_fusion(how: FusionBenchmark, preset: str, seed: int) -> FusionRow:
    """Train a few steps on random adapters of a size, one thread."""
    torch.set_num_threads(1)
    spec = SIDES[preset]
    layers = {f"{i}.{n}": s for i in range(how.copies) for n, s in how.layers.items()}
    adapters = [random_adapter(layers, f"task{k}", how.rank, seed) for k in range(TASKS)]
    numbers = sum(f.a.numel() + f.b.numel() for f in adapters[0].modules.values())
    samples = [sample for adapter in adapters for sample in _trajectory(adapter)]
    vectors = {a.name: torch.randn(V, generator=generator(a.name, seed)) for a in adapters}
    with PeakMemory() as peak:
        started = time.process_time()
        layout = Layout.fit(spec.representation, samples)
        table = FusionTable.of(layout, samples, vectors)
        fitted = time.process_time() - started
        meta = MetaTraining.build(spec, layout, table, None, seed)
        optimizer = optimizer_of(meta)
        seconds = []
        for step in range(how.repeats + 1):  # the first one makes the optimiser's moments
            started = time.process_time()
            tasks = meta.tasks_of(step)
            optimizer.zero_grad()
            meta(step, tasks)["loss"].backward()
            optimizer.step()
            seconds.append((time.process_time() - started) / (spec.batch * len(tasks)))
    return FusionRow(
        label=how.label,
        preset=preset,
        numbers=numbers,
        size=layout.size,
        parameters=sum(p.numel() for p in meta.vae.parameters()),
        layout_seconds=fitted,
        seconds=statistics.median(seconds[1:]),
        peak_bytes=peak.extra_bytes,
        goal=how.goal if preset == "default" else "",
    )


def _trajectory(adapter: Adapter) -> list[Sample]:
    """Return checkpoints on a shaky way to an adapter, which is the last of them."""
    samples = []
    for step in range(1, CHECKPOINTS):
        rest = 1 - step / CHECKPOINTS
        late = {}
        for module, f in adapter.modules.items():
            shaken = torch.randn(f.a.shape, generator=generator(adapter.name, module, step))
            late[module] = LoRAFactors(f.a + rest * f.a.std() * shaken, f.b * (1 - rest / 2))
        samples.append(Sample(adapter.name, step, late))
    return [*samples, Sample(adapter.name, CHECKPOINTS, adapter.modules, is_final=True)]
