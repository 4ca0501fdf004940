"""The Fusion-VAE on Ray Train and DeepSpeed: the serial loop's network, whoever dies."""

import json
import os
from pathlib import Path

import pytest
import ray
import torch
from ray_samples import write_yaml

from icm_ray.adapters import load_adapter
from icm_ray.command import run_job
from icm_ray.config import EngineSpec, FusionSpec, Resources, TrainFusionRecipe
from icm_ray.distributed import fusion_engine
from icm_ray.distributed.fusion_engine import FusionOrder, check_hashes
from icm_ray.distributed.train_fusion import train_fusion_on_ray
from icm_ray.errors import InputError, RecipeError
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.store import load_fusion
from icm_ray.fusion.train import train
from icm_ray.vae.layout import Layout, Sample
from jobs.train_fusion import work

# Ray Data's own, of settings it reads and nobody set.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SPEC = FusionSpec.model_validate(
    {
        "representation": {"components": 8},
        "vae": {"latent": 4, "hidden": 16},
        "inner": {"loss": "reconstruction"},
        "vae_steps": 4,
        "meta_steps": 2,
        "batch": 4,
    }
)


@pytest.fixture(scope="module")
def material(adapters):
    """Layout and table of three adapters, each with two checkpoints on its way."""
    samples = []
    for name, path in adapters[:3]:
        final = load_adapter(path, name)
        for step in (1, 2):
            part = {m: type(f)(f.a, f.b * step / 3, f.scaling) for m, f in final.modules.items()}
            samples.append(Sample(name, step, part))
        samples.append(Sample(name, 3, final.modules, is_final=True))
    layout = Layout.fit(SPEC.representation, samples)
    names = [name for name, _ in adapters[:3]]
    draw = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(8, generator=draw) for name in names}
    return layout, FusionTable.of(layout, samples, vectors)


def order_of(layout, *, spec=SPEC, workers=2, **engine):
    resources = Resources(workers=workers, cpus_per_worker=0.5, timeout_seconds=120)
    return FusionOrder(spec, EngineSpec(**engine), layout, (), None, resources, 3)


def serial(material, spec=SPEC):
    layout, table = material
    meta = MetaTraining.build(spec, layout, table, seed=3)
    return meta, train(meta)


def same(found, material, spec=SPEC):
    meta, history = serial(material, spec)
    for name, value in meta.vae.state_dict().items():
        torch.testing.assert_close(found.vae.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    for one, other in zip(found.history, history, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)


def test_two_workers_train_the_serial_loops_network_and_halve_the_optimiser(material, tmp_path):
    layout, table = material
    found = train_fusion_on_ray(order_of(layout, zero_stage=1), table, tmp_path, 2)
    same(found, material)
    whole = 2 * 4 * sum(p.numel() for p in found.vae.parameters())
    assert found.optimizer_bytes == pytest.approx([whole / 2, whole / 2], rel=0.05)
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    assert not list(built.rglob("*deepspeed*")), "an op was compiled"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "workers", "parts"), [(0, 1, 1), (0, 2, 1), (2, 2, 1), (1, 1, 3), (2, 2, 2)]
)
def test_every_stage_and_split_trains_the_same_network(
    ray_session, material, tmp_path, stage, workers, parts
):
    layout, table = material
    order = order_of(layout, workers=workers, zero_stage=stage, accumulation=parts)
    found = train_fusion_on_ray(order, table, tmp_path, workers)
    same(found, material)
    whole = 2 * 4 * sum(p.numel() for p in found.vae.parameters())
    share = whole / (workers if stage else 1)
    assert found.optimizer_bytes == pytest.approx([share] * workers, rel=0.05)


@pytest.mark.slow
def test_a_lost_worker_changes_nothing(ray_session, material, tmp_path):
    layout, table = material
    mark = tmp_path / "died"

    def dying(config):
        step = fusion_engine._step

        def last_words(engine, meta, number):
            rank = torch.distributed.get_rank()
            if number == 4 and rank == 1 and not mark.exists():
                mark.touch()
                os._exit(13)
            return step(engine, meta, number)

        fusion_engine._step = last_words
        fusion_engine.train_worker(config)

    order = order_of(layout, zero_stage=1, checkpoint_every=2)
    found = train_fusion_on_ray(order, table, tmp_path / "run", 2, worker=dying)
    assert mark.exists()
    same(found, material)


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_said(ray_session, material, tmp_path):
    layout, table = material
    broken = FusionTable(table.tasks, table.steps, table.x * 1e30, table.v, table.is_final)
    with pytest.raises(RecipeError, match=r"fusion\.lr"):
        train_fusion_on_ray(order_of(layout, workers=1), broken, tmp_path, 1)


def test_a_changed_checkpoint_is_not_unpickled(tmp_path):
    with pytest.raises(InputError, match="hashes"):
        check_hashes(tmp_path)
    (tmp_path / "shard.pt").write_bytes(b"other")
    (tmp_path / "hashes-0.json").write_text(json.dumps({"shard.pt": "0" * 64}))
    with pytest.raises(InputError, match=r"shard\.pt"):
        check_hashes(tmp_path)


@pytest.mark.slow
def test_the_job_trains_through_the_base_and_is_found_done(
    ray_session, tiny_bert, experts, tmp_path
):
    made = experts / "experts" / "shared-seed0"
    tasks = sorted(path.name for path in made.iterdir() if path.is_dir())
    recipe = {
        "base": str(tiny_bert),
        "adapters": [{"name": t, "path": str(made / t / "adapter")} for t in tasks],
        "trajectories": str(experts / "trajectories" / "shared-seed0"),
        "data": {"suite": "text", "inputs_per_task": 4},
        "fusion": {**SPEC.model_dump(), "inner": {"loss": "task_vector"}},
        "input_batch": 4,
        "resources": {"workers": 2, "cpus_per_worker": 0.5},
        "output": str(tmp_path / "vae"),
    }
    path = write_yaml(tmp_path / "fusion.yaml", recipe)
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 0
    model = load_fusion(tmp_path / "vae")
    assert model.tasks == tuple(tasks)
    assert len(model.report["history"]["loss"]) == SPEC.steps
    assert "Fusion-VAE of 2 adapters" in (tmp_path / "vae.report" / "index.html").read_text()
    before = (tmp_path / "vae" / "manifest.json").stat().st_mtime_ns
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 0
    assert (tmp_path / "vae" / "manifest.json").stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*"))
    assert ray.is_initialized()
