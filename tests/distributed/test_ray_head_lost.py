"""A cluster whose head dies under a submitted job: the same line on the next head goes on.

pytest tests/distributed/test_ray_head_lost.py -m long
"""

import json
import subprocess
import time

import pytest
import yaml
from job_runs import finetune_plain, finish, gone, recipe_of_job, until, wide_adapters, write_recipe
from ray_heads import copy_tree, started
from ray_samples import hashes

OWN_RAY = True
STATES = {"learn": ".runs.*/**/*.safetensors", "finetune": "runs/experts/*/.*/state.*"}
"""What shows that a job has begun, and has something to go on from."""


@pytest.fixture(scope="module")
def made(tiny_bert, tmp_path_factory):
    """Base, trained experts and wide adapters."""
    root = tmp_path_factory.mktemp("made")
    finish("finetune", write_recipe(root, "finetune", finetune_plain(tiny_bert, root / "experts")))
    return tiny_bert, root / "experts", wide_adapters(root / "wide")


@pytest.mark.long
@pytest.mark.parametrize("job", STATES)
def test_a_head_lost_under_a_job_is_followed_by_another(job, made, tmp_path):
    expected = tmp_path / "quiet"
    finish(job, write_recipe(tmp_path, job, recipe_of_job(job, expected, *made)))
    tree, storage = tmp_path / "tree", tmp_path / "storage"
    tree.mkdir()
    storage.mkdir()
    copy_tree(tree)
    plain = recipe_of_job(job, expected, *made)
    (tree / "job.yaml").write_text(yaml.safe_dump({**plain, "output": "runs"}))
    line = ["python", "-m", f"jobs.{job}", "-c", "job.yaml", f"storage={storage}"]
    with started(_folder(tmp_path / "first")) as head:
        client = subprocess.Popen(head.submission(*line), cwd=tree, env=head.sender)
        until(lambda: list(storage.glob(STATES[job])), client)
        everyone = head.processes()
        started_at = time.monotonic()
        for process in everyone:  # as a machine that loses its power
            process.kill()
        assert gone(everyone, 30) == []
        assert client.wait(timeout=120) != 0
        print(f"{job}: client told after {time.monotonic() - started_at:.1f} s")
    with started(_folder(tmp_path / "second")) as head:
        done = head.submit(tree, *line)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads((storage / "runs" / "results.json").read_text())
    assert found["status"] == "done"
    parts = ("experts", "trajectories", "probes") if job == "finetune" else (".",)
    for part in parts:
        assert hashes(storage / "runs" / part) == hashes(expected / part)


def _folder(path):
    path.mkdir()
    return path
