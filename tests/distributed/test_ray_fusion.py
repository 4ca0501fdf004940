"""The Fusion-VAE on Ray Train and DeepSpeed: the serial loop's network, whoever dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import ray
import torch
from ray import cloudpickle
from ray_samples import ROOT, environment, write_yaml
from safetensors.torch import load_file, save_file

from icm_ray.adapters import load_adapter
from icm_ray.command import run_job
from icm_ray.config import EngineSpec, FusionSpec, LearnRecipe, Resources, TrainFusionRecipe
from icm_ray.distributed import fusion_worker
from icm_ray.distributed.fusion_trainer import train_fusion_on_ray
from icm_ray.distributed.fusion_worker import FusionOrder, check_hashes, read_progress
from icm_ray.errors import ClusterError, InputError, RecipeError
from icm_ray.evidence.learned import load_learned
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.store import load_fusion
from icm_ray.fusion.train import train
from icm_ray.fusion_vae.layout import Layout, Sample
from icm_ray.merging.merge import merge
from jobs.learn import work as learn_work
from jobs.train_fusion import work

pytestmark = [
    # Ray Data's own, of settings it reads and nobody set.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Workers that import DeepSpeed take minutes to start on a machine with other work.
    pytest.mark.timeout(2400),
]
# Workers have no such module to import helpers from.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
PATIENCE = 900
"""Seconds until something that must come has not come."""
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
    resources = Resources(workers=workers, cpus_per_worker=0.5, timeout_seconds=PATIENCE)
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


@pytest.mark.slow
def test_two_workers_train_the_serial_loops_network_and_halve_the_optimiser(material, tmp_path):
    layout, table = material
    built = tmp_path / "ops"

    def watched(config):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(built)
        fusion_worker.train_worker(config)

    order = order_of(layout, zero_stage=1)
    found = train_fusion_on_ray(order, table, tmp_path, 2, worker=watched)
    same(found, material)
    whole = 2 * 4 * sum(p.numel() for p in found.vae.parameters())
    assert found.optimizer_bytes == pytest.approx([whole / 2, whole / 2], rel=0.05)
    assert not built.exists(), "an op was compiled"


@pytest.mark.parametrize(
    ("stage", "workers", "parts"),
    [
        pytest.param(0, 2, 1, marks=pytest.mark.long),
        pytest.param(1, 1, 3, marks=pytest.mark.long),
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
    ],
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


@pytest.mark.parametrize(
    ("max_failures", "stage"),
    [
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(0, 0, marks=pytest.mark.slow),
        pytest.param(3, 2, marks=pytest.mark.long),
    ],
)
def test_a_lost_worker_changes_nothing(ray_session, material, tmp_path, max_failures, stage):
    layout, table = material
    mark, made = tmp_path / "died", tmp_path / "made"

    def dying(config):
        step = fusion_worker._step

        def last_words(engine, meta, number):
            rank = torch.distributed.get_rank()
            if number == 4 and rank == 1 and not mark.exists():
                wait_for(lambda: resumable(tmp_path / "run"))
                mark.touch()
                os._exit(13)
            found = step(engine, meta, number)
            if rank == 0:
                with made.open("a") as file:
                    file.write(f"{number} ")
            return found

        fusion_worker._step = last_words
        fusion_worker.train_worker(config)

    order = order_of(layout, zero_stage=stage, checkpoint_every=3, max_failures=max_failures)
    if max_failures == 0:
        with pytest.raises(ClusterError, match="run the same command"):
            train_fusion_on_ray(order, table, tmp_path / "run", 2, worker=dying)
    found = train_fusion_on_ray(order, table, tmp_path / "run", 2, worker=dying)
    assert mark.exists()
    assert made.read_text() == "0 1 2 3 3 4 5 "  # step 3 came after the last checkpoint
    same(found, material)


@pytest.mark.slow
def test_an_error_of_ours_comes_back_as_itself(ray_session, material, tmp_path):
    layout, table = material
    spec = FusionSpec.model_validate({**SPEC.model_dump(), "inner": {"loss": "task_vector"}})
    order = order_of(layout, spec=spec, workers=1, max_failures=0)
    with pytest.raises(RecipeError, match="needs a base and inputs"):
        train_fusion_on_ray(order, table, tmp_path, 1)


@pytest.mark.long
def test_trials_of_tune_train_through_the_same_function(ray_session, material, tmp_path):
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    layout, table = material
    specs = {w: FusionSpec(**{**SPEC.model_dump(), "kl_weight": w}) for w in (1e-5, 1.0)}

    def trial(config):
        weight = config["kl_weight"]
        order = order_of(layout, spec=specs[weight], workers=1, report_every=1)
        callbacks = [TuneReportCallback()]
        train_fusion_on_ray(order, table, tmp_path / f"trial-{weight}", 1, callbacks)

    # A trial that held a CPU would wait for workers that wait for its CPU.
    alone = tune.with_resources(trial, tune.PlacementGroupFactory([{"slot": 1}]))
    results = tune.Tuner(
        alone,
        param_space={"kl_weight": tune.grid_search(list(specs))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path)),
    ).fit()
    assert not results.errors
    for result in results:
        _, history = serial(material, specs[result.config["kl_weight"]])
        assert list(result.metrics_dataframe["loss"]) == pytest.approx(
            [step["loss"] for step in history], rel=1e-4
        )


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
    (tmp_path / "hashes-0.json").write_text("{}")
    with pytest.raises(InputError, match=r"shard\.pt"):
        check_hashes(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_by_its_number(tmp_path):
    notes = tmp_path / "progress-0.json"
    notes.write_text(json.dumps({"history": []}))  # as before there was a number
    assert read_progress(notes) == {"history": []}
    notes.write_text(json.dumps({"format": 2, "history": []}))
    with pytest.raises(InputError, match=r"progress-0\.json: checkpoint of format 2 but 1 is"):
        read_progress(notes)


def test_checkpoints_are_not_resumed_from_a_folder_that_others_can_use(material, tmp_path):
    layout, table = material
    (tmp_path / "run").mkdir(mode=0o755)
    with pytest.raises(InputError, match="only this user"):
        train_fusion_on_ray(order_of(layout), table, tmp_path / "run", 2)


def test_resources_that_do_not_fit_are_all_told(adapters, tmp_path, capsys):
    recipe = {
        "base": "tiny",
        "adapters": [{"name": name, "path": str(path)} for name, path in adapters[:2]],
        "data": {"suite": "text"},
        "resources": {"device": "cuda", "gpus_per_worker": 0.5},
        "output": str(tmp_path / "vae"),
    }
    path = write_yaml(tmp_path / "fusion.yaml", recipe)
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in told] == [
        "resources.backend",
        "resources.gpus_per_worker",
    ]


def test_a_training_of_nothing_is_told(adapters, tmp_path, capsys):
    name, folder = adapters[0]
    recipe = {
        "base": "tiny",
        "adapters": [{"name": name, "path": str(folder)}],
        "data": {"suite": "text"},
        "fusion": {"vae_steps": 0, "meta_steps": 0},
        "output": str(tmp_path / "vae"),
    }
    path = write_yaml(tmp_path / "fusion.yaml", recipe)
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 2
    told = capsys.readouterr().err
    assert "adapters: one but two or more" in told
    assert "fusion: no step" in told
    path = write_yaml(tmp_path / "joins.yaml", {**recipe, "joins": recipe["output"]})
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 2
    assert "output: the folder of joins" in capsys.readouterr().err


def job_recipe(base, experts, output, **fusion):
    made = experts / "experts" / "shared-seed0"
    tasks = sorted(path.name for path in made.iterdir() if path.is_dir())
    return tasks, {
        "base": str(base),
        "adapters": [{"name": t, "path": str(made / t / "adapter")} for t in tasks],
        "trajectories": str(experts / "trajectories" / "shared-seed0"),
        "data": {"suite": "text", "inputs_per_task": 4},
        "fusion": {**SPEC.model_dump(), "inner": {"loss": "task_vector"}, **fusion},
        "input_batch": 4,
        "engine": {"checkpoint_every": 5, "report_every": 1},
        "resources": {"workers": 2, "cpus_per_worker": 0.5},
        "output": str(output),
    }


@pytest.mark.slow
def test_the_job_trains_through_the_base_and_is_found_done(
    ray_session, tiny_bert, experts, tmp_path, capsys
):
    tasks, recipe = job_recipe(tiny_bert, experts, tmp_path / "vae")
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

    # One worker makes the same of both tasks' base and inputs.
    path = write_yaml(
        tmp_path / "alone.yaml",
        {
            **recipe,
            "resources": {"workers": 1, "cpus_per_worker": 0.5},
            "output": str(tmp_path / "alone"),
        },
    )
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 0
    alone = load_fusion(tmp_path / "alone").report["history"]
    for name, losses in model.report["history"].items():
        assert alone[name] == pytest.approx(losses, rel=1e-3, abs=1e-7)
    assert all(loss > 0 for loss in alone["inner"][SPEC.vae_steps :])

    # A new task joins without training: here an adapter it knows, by another name.
    joins = {key: recipe[key] for key in ("base", "data", "resources")} | {
        "adapters": [{"name": "year", "path": recipe["adapters"][0]["path"]}],
        "joins": str(tmp_path / "vae"),
        "output": str(tmp_path / "more"),
    }
    path = write_yaml(tmp_path / "joins.yaml", joins)
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 0
    more = load_fusion(tmp_path / "more")
    assert more.tasks == tuple(sorted([*tasks, "year"]))
    errors = more.report["reconstruction_error"]
    assert errors["year"] == pytest.approx(errors[tasks[0]], abs=0.1)
    before = (tmp_path / "more" / "manifest.json").stat().st_mtime_ns
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 0
    assert (tmp_path / "more" / "manifest.json").stat().st_mtime_ns == before
    two = [
        load_adapter(one["path"], one["name"])
        for one in (joins["adapters"][0], recipe["adapters"][1])
    ]
    assert merge(two, "icm_fusion", evidence=tmp_path / "more").report.modules
    shutil.copytree(tiny_bert, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({n: 2 * t for n, t in weights.items()}, tmp_path / "other" / "model.safetensors")
    others = {**joins, "base": str(tmp_path / "other"), "output": str(tmp_path / "others")}
    path = write_yaml(tmp_path / "joins.yaml", others)
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 3
    assert "base: not the one" in capsys.readouterr().err
    twice = {**joins, "joins": str(tmp_path / "more"), "output": str(tmp_path / "most")}
    path = write_yaml(tmp_path / "joins.yaml", twice)
    assert run_job(TrainFusionRecipe, work, "", ["-c", str(path)]) == 3
    assert "year: known to the Fusion-VAE already" in capsys.readouterr().err

    # What it knows can then be adapted in context, here above RegMean.
    learn = {key: recipe[key] for key in ("base", "adapters", "data", "resources")} | {
        "method": "icm_fusion",
        "fusion": str(tmp_path / "vae"),
        "learn": {
            "start": {"residual": "regmean", "rho": 0.8},
            "optimisation": {"steps": 2, "batch": 4},
        },
        "output": str(tmp_path / "adapted"),
    }
    path = write_yaml(tmp_path / "learn.yaml", learn)
    assert run_job(LearnRecipe, learn_work, "", ["-c", str(path)]) == 0
    assert "<svg" in (tmp_path / "adapted.report" / "index.html").read_text()
    files = [(one["name"], one["path"]) for one in recipe["adapters"]]
    adapters = [load_adapter(path, name) for name, path in files]
    grams = tmp_path / "adapted.grams"
    beneath = merge(adapters, "regmean", params={"rho": 0.8}, evidence=grams).adapter.modules
    kept = load_learned(tmp_path / "adapted").tensors
    found = merge(adapters, "icm_fusion", evidence=tmp_path / "adapted").adapter.modules
    for module, factors in beneath.items():
        residual = kept[f"{module}.residual_b"] @ kept[f"{module}.residual_a"]
        torch.testing.assert_close(residual, factors.delta(), rtol=1e-3, atol=1e-5)
        away = (found[module].delta() - factors.delta()).norm()
        assert away > 1e-3 * factors.delta().norm()

    # A Fusion-VAE of other adapters by the same names is refused before any work.
    swapped = [{**one, "path": files[1 - i][1]} for i, one in enumerate(recipe["adapters"])]
    path = write_yaml(tmp_path / "learn.yaml", {**learn, "adapters": swapped})
    assert run_job(LearnRecipe, learn_work, "", ["-c", str(path)]) == 3
    assert "not the adapters the Fusion-VAE was trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_job_goes_on_where_it_was(ray_session, tiny_bert, experts, tmp_path):
    out, steps = tmp_path / "vae", 60
    _, recipe = job_recipe(tiny_bert, experts, out, vae_steps=steps - 2)
    path = write_yaml(tmp_path / "fusion.yaml", recipe)
    first = start(path, tmp_path / "first.log")
    wait_for(lambda: any(map(resumable, tmp_path.glob(".vae.training-*"))), first)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=PATIENCE) == 130, (tmp_path / "first.log").read_text()
    assert not out.exists()
    second = start(path, tmp_path / "second.log", RAY_BACKEND_LOG_LEVEL="error")  # all is shown
    assert second.wait(timeout=PATIENCE) == 0, (tmp_path / "second.log").read_text()
    # A worker's last lines may be lost with it, the first ones are not.
    made = re.findall(rf"step (\d+)/{steps}: loss", (tmp_path / "second.log").read_text())
    assert int(made[0]) > 5
    assert len(made) == len(set(made)), "said twice"
    assert len(load_fusion(out).report["history"]["loss"]) == steps
    for log in ("first.log", "second.log"):
        told = (tmp_path / log).read_text()
        assert "PlacementGroupCleaner" not in told
        assert "Reported metrics" not in told
    assert "step " not in (tmp_path / "first.log").read_text()


def start(recipe, log, **more):
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.train_fusion", "-c", str(recipe)],
            cwd=ROOT,
            env=environment(**more),
            stdout=file,
            stderr=file,
        )


def wait_for(found, job=None):
    deadline = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < deadline, "nothing came"
        assert job is None or job.poll() is None, "ended before it could be interrupted"
        time.sleep(0.05)


def resumable(folder):
    """Whether Ray Train has noted a checkpoint; its files are there a little earlier."""
    try:
        noted = json.loads((folder / "train" / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return noted["latest_checkpoint_result"] is not None
