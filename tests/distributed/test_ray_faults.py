"""Killed drivers, killed actors and more than one node: the same bytes in the end.

These start jobs of their own and take minutes, so they run on demand:

    pytest tests/distributed/test_ray_faults.py -m slow       killed and terminated pipelines
    pytest tests/distributed/test_ray_faults.py -m cluster    a killed actor, nodes lost
    pytest tests/distributed/test_ray_faults.py -m long       a node lost under DeepSpeed
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
import torch
from job_runs import KEPT, family, finish, gone, said, start, visible
from ray_samples import ROOT, environment, finetune_recipe, hashes, session_on, write_yaml

from icm_ray.adapters import open_all
from icm_ray.distributed.evidence import gather_on_ray
from icm_ray.distributed.session import Pool
from icm_ray.files import read_manifest
from icm_ray.suites import SUITES

STEPS = 400


def pipeline(tiny_bert, folder):
    """Write the recipe of a pipeline whose fine-tuning lasts long enough to be hit."""
    plain = json.loads(finetune_recipe(tiny_bert, folder).model_dump_json(exclude_defaults=True))
    training = {"steps": STEPS, "batch": 16, "train_examples": 200, "save_every": 5}
    more = {"name": "kill", "methods": [{"method": "soup"}, {"method": "svd"}]}
    return write_yaml(
        folder.with_name(f"{folder.name}.yaml"), {**plain, **more, "training": training}
    )


def until_training(job, out):
    """Wait until an expert has left a state to resume from, and is not done."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if list(out.glob("experts/*/.*/state.safetensors")):
            return
        assert job.poll() is None, "ended before it could be hit"
        time.sleep(0.02)
    pytest.fail("no expert started training")


@pytest.fixture(scope="module")
def unbroken(tiny_bert, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    finish("pipeline", pipeline(tiny_bert, out))
    return {name: hashes(out / name) for name in KEPT}


@pytest.mark.slow
def test_a_killed_pipeline_continues_to_the_same_bytes(unbroken, tiny_bert, tmp_path):
    out = tmp_path / "out"
    recipe = pipeline(tiny_bert, out)
    job = start("pipeline", recipe)
    until_training(job, out)
    everyone = family(job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert gone(everyone, 60) == []  # no Ray process outlives its driver
    for folder in visible(out):
        read_manifest(folder)
    assert not (out / "merged").exists()
    finish("pipeline", recipe)
    assert {name: hashes(out / name) for name in unbroken} == unbroken


@pytest.mark.slow
def test_a_terminated_pipeline_says_how_to_go_on(unbroken, tiny_bert, tmp_path):
    out = tmp_path / "out"
    recipe = pipeline(tiny_bert, out)
    job = start("pipeline", recipe)
    until_training(job, out)
    everyone = family(job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 143, said(recipe)
    assert gone(everyone[1:], 60) == []
    assert "error: terminated. Run the same command to resume." in (said(recipe))
    found = json.loads((tmp_path / "out.results.json").read_text())
    assert (found["status"], found["exit_code"]) == ("failed", 143)
    finish("pipeline", recipe)
    assert {name: hashes(out / name) for name in unbroken} == unbroken
    assert not (tmp_path / "out.results.json").exists()


@pytest.mark.cluster
def test_a_killed_actor_changes_no_byte(ray_session, tiny_bert, adapters):
    files = open_all(adapters[:2])
    texts = SUITES["text"].load("year", "train", 3000).texts
    inputs = {file.name: (texts, 24) for file in files}
    pool = Pool(session_on(tiny_bert, cpus_per_worker=0.5, workers=2), 2)
    expected = gather_on_ray(pool, files, inputs, batch=8)
    victim = ray.get(pool.actors[0].__ray_call__.remote(lambda _: os.getpid()))
    killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
    killer.start()
    found = gather_on_ray(pool, files, inputs, batch=8)
    killer.join()
    assert ray.get(pool.actors[0].__ray_call__.remote(lambda _: os.getpid())) != victim
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.task_vector, other.task_vector)
        assert (one.expert_ratios, one.base_ratios) == (other.expert_ratios, other.base_ratios)


@pytest.mark.cluster
def test_two_nodes_share_the_work_and_one_may_be_lost(tiny_bert, adapters):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "distributed" / "two_nodes.py"),
            str(tiny_bert),
            *(str(folder) for _, folder in adapters[:2]),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert first == {"nodes": 2, "same": True}
    assert second == {"nodes": 2, "same": True}


@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param(("merge", "learn", "search"), marks=pytest.mark.long),
        pytest.param(("train_fusion",), marks=pytest.mark.long),
    ],
    ids="-".join,
)
def test_a_node_lost_in_the_middle_changes_no_byte(jobs, tmp_path):
    here = ROOT / "tests" / "distributed"
    done = subprocess.run(
        [sys.executable, str(here / "lost_node.py"), str(tmp_path), *jobs],
        cwd=ROOT,
        env=environment(PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests", here)))),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(one["job"], one["same"]) for one in told] == [(job, True) for job in jobs]
