"""Merging on Ray gives the bytes of merging here, however the work is split."""

import shutil

import pytest
import torch
from ray_samples import hashes, merge_recipe, save_peft, write_yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from icm_ray.adapters import open_adapter, open_all
from icm_ray.cli import app
from icm_ray.command import run_job
from icm_ray.config import MergeRecipe, Resources
from icm_ray.distributed.merge import merge_on_ray, shard_modules
from icm_ray.errors import InputError
from icm_ray.merging.merge import merge
from icm_ray.merging.order import MergeRequest, plan_merge
from jobs.merge import work

METHODS = {
    "soup": {},
    "task_arithmetic": {"scale": 0.4},
    "svd": {},
    "negate_add": {"target": "task0", "a": "task1", "b": "task2"},
    "ties": {"density": 0.4, "restore_norm": True, "calibrate": "measured", "scale_last": 0.5},
    "dare_ties": {"density": 0.6},
    "knots_ties": {"density": 0.4},
    "core_space": {"inner": "ties"},
    "svd_latent": {},
    "fr_merging": {"ratio": 0.5},
    "emr": {},
}


def same(found, expected):
    """Say whether two merges are the same bit for bit, reports included."""
    assert found.report == expected.report
    assert list(found.adapter.modules) == list(expected.adapter.modules)
    assert found.adapter.fingerprint == expected.adapter.fingerprint
    for module, factors in expected.adapter.modules.items():
        assert torch.equal(found.adapter.modules[module].a, factors.a)
        assert torch.equal(found.adapter.modules[module].b, factors.b)
    prints = {task: adapter.fingerprint for task, adapter in expected.per_task.items()}
    assert {task: adapter.fingerprint for task, adapter in found.per_task.items()} == prints


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_workers_gives_the_serial_merge(adapters, method):
    files = open_all(adapters)
    order = {"params": METHODS[method], "seed": 3}
    expected = merge([file.load() for file in files], method, **order)
    for workers in (1, 2, 4):
        request = MergeRequest(method, **order)
        found = merge_on_ray(files, request, Resources(workers=workers), shard_bytes=500)
        same(found, expected)


def test_any_shard_size_gives_the_serial_merge(adapters):
    files = open_all(adapters)
    expected = merge([file.load() for file in files], "svd", output_rank="energy:0.9")
    request = MergeRequest("svd", output_rank="energy:0.9")
    order = plan_merge(files, request)
    counts = []
    for size in (1, 5000, 10**9):
        counts.append(len(shard_modules(order, files, size)))
        found = merge_on_ray(files, request, Resources(workers=2), shard_bytes=size)
        same(found, expected)
    assert counts[0] == len(order.present) > counts[1] > counts[2] == 1


@pytest.mark.slow
def test_a_budget_in_the_metric_of_inputs_is_the_serial_one(adapters):
    files = open_all(adapters)
    shapes = {m: shape for file in files for m, shape in file.shapes.items()}
    draw = torch.Generator().manual_seed(0)
    grams = {}
    for module, (_, d_in, _) in shapes.items():
        for file in files:
            x = torch.randn(50, d_in, generator=draw) * torch.linspace(0.1, 2, d_in)
            grams[f"{module}.gram.{file.name}"] = x.T @ x / 50
    how = {"evidence": grams, "output_rank": f"total:{2 * len(shapes)}"}
    expected = merge([file.load() for file in files], "regmean", **how)
    assert expected.report.seen_energy < 1
    found = merge_on_ray(
        files, MergeRequest("regmean", **how), Resources(workers=2), shard_bytes=500
    )
    same(found, expected)


def test_shards_cover_every_module_once_and_in_order(adapters):
    files = open_all(adapters)
    order = plan_merge(files, MergeRequest("soup"))
    for size in (1, 1500, 5000, 10**9):
        shards = shard_modules(order, files, size)
        assert [module for shard in shards for module in shard] == list(order.present)
        assert all(shards)


def test_thirty_adapters(tiny_bert, tmp_path):
    first = save_peft(tiny_bert, tmp_path / "00", 0, r=2, target_modules=["query"])
    refs = [("00", first)]
    for i in range(1, 30):
        folder = tmp_path / f"{i:02d}"
        shutil.copytree(first, folder)
        weights = folder / "adapter_model.safetensors"
        tensors = {n: torch.roll(t, i) * (1 + i / 30) for n, t in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        refs.append((f"{i:02d}", folder))
    files = open_all(refs)
    found = merge_on_ray(files, MergeRequest("soup"), Resources(workers=4), shard_bytes=1000)
    same(found, merge([file.load() for file in files], "soup"))
    assert found.adapter.max_rank == 16  # 30 adapters of rank 2 fill a 16 x 16 module


def test_the_job_writes_the_bytes_of_the_command(adapters, tmp_path):
    recipe = write_yaml(tmp_path / "svd.yaml", merge_recipe(adapters, tmp_path, method="svd"))
    done = CliRunner().invoke(app, ["merge", "-c", str(recipe), f"output.path={tmp_path}/serial"])
    assert done.exit_code == 0, done.output
    expected = hashes(tmp_path / "serial")
    assert {"adapter_model.safetensors", "manifest.json", "README.md"} <= set(expected)
    for workers in (1, 2, 4):
        out = tmp_path / f"ray{workers}"
        words = ["-c", str(recipe), f"output.path={out}", f"resources.workers={workers}"]
        assert run_job(MergeRecipe, work, "", words) == 0
        assert hashes(out) == expected


def test_the_order_in_which_adapters_are_listed_changes_no_byte(adapters, tmp_path):
    found = []
    for name, refs in (("as-named", adapters), ("reversed", adapters[::-1])):
        recipe = write_yaml(tmp_path / f"{name}.yaml", merge_recipe(refs, tmp_path / name))
        assert run_job(MergeRecipe, work, "", ["-c", str(recipe)]) == 0
        found.append(hashes(tmp_path / name))
    assert found[0] == found[1]


def test_a_workers_complaint_about_nan_names_the_file(adapters, tmp_path):
    name, good = adapters[0]
    folder = shutil.copytree(good, tmp_path / "bad")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    spoilt = sorted(tensors)[-1]
    tensors[spoilt][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    # Opened, not scanned: only the worker that reads the module can notice.
    files = [open_adapter(folder, name), open_adapter(adapters[1][1], adapters[1][0])]
    with pytest.raises(InputError) as caught:
        merge_on_ray(files, MergeRequest("soup"), Resources(workers=2), shard_bytes=500)
    assert str(weights) in str(caught.value)
    assert spoilt in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_file_that_vanishes_before_the_worker_reads_it_is_named(adapters, tmp_path):
    name, good = adapters[0]
    folder = shutil.copytree(good, tmp_path / "gone")
    files = open_all([(name, folder), adapters[1]])
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="gone"):
        merge_on_ray(files, MergeRequest("soup"), Resources())


def test_modules_and_ranks_may_differ(adapters):
    files = open_all(adapters)
    found = merge_on_ray(files, MergeRequest("cat"), Resources(workers=2), shard_bytes=1)
    same(found, merge([file.load() for file in files], "cat"))
    absent = {report.absent for report in found.report.modules.values()}
    assert ("task0", "task1", "task3", "task4") in absent  # only task2 has keys
