"""`ray job submit` to a head that is really started, with a token."""

import contextlib
import json
import os
import re
import shlex
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ray_heads import copy_tree, started
from ray_samples import ROOT, hashes, merge_recipe, write_yaml
from typer.testing import CliRunner

from icm_ray.cli import app

OWN_RAY = True
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A cluster of one node that asks for a token."""
    with started(tmp_path_factory.mktemp("head")) as one:
        yield one


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a user submits, and a large file that is not to be sent."""
    folder = tmp_path_factory.mktemp("tree")
    copy_tree(folder, "*.parquet")
    (folder / "runs").mkdir()
    (folder / "runs" / "large.bin").write_bytes(os.urandom(1000))
    return folder


def test_strangers_are_turned_away(head):
    for token in (None, "b" * 64):
        with pytest.raises(urllib.error.HTTPError) as caught:
            head.ask(token=token)
        assert caught.value.code in (401, 403)
        caught.value.close()


def test_a_submitted_merge_writes_under_storage(head, tree, adapters, tmp_path):
    recipe = write_yaml(tree / "svd.yaml", merge_recipe(adapters, Path("runs/svd"), method="svd"))
    line = ["python", "-m", "jobs.merge", "-c", "svd.yaml"]
    done = head.submit(tree, *line, f"storage={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "runs" / "svd" / "results.json").read_text())
    assert (found["status"], found["exit_code"]) == ("done", 0)
    assert found["outputs"] == {"adapter": str(tmp_path / "runs" / "svd")}
    words = ["merge", "-c", str(recipe), f"output.path={tmp_path / 'here'}"]
    here = CliRunner().invoke(app, words)
    assert here.exit_code == 0, here.output
    assert hashes(tmp_path / "runs" / "svd") == hashes(tmp_path / "here")


def test_how_far_a_stage_is_can_be_read_as_a_metric(head, tree, adapters, tmp_path):
    write_yaml(tree / "ties.yaml", merge_recipe(adapters, Path("runs/ties"), method="ties"))
    line = ["python", "-m", "jobs.merge", "-c", "ties.yaml", f"storage={tmp_path}"]
    seen, stop = set(), threading.Event()

    def read():
        while not stop.wait(0.3):
            with contextlib.suppress(OSError), urllib.request.urlopen(head.metrics) as answer:
                seen.update(re.findall(r"^(ray_icm_ray_\w+)\{", answer.read().decode(), re.M))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert head.submit(tree, *line).returncode == 0
    finally:
        stop.set()
        thread.join()
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    shown = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    assert seen == set(re.findall(r"ray_icm_ray_\w+", shown))


def test_a_job_that_would_lose_its_output_ends_with_the_reason(head, tree, adapters):
    write_yaml(tree / "soup.yaml", merge_recipe(adapters, Path("runs/soup")))
    listing = "import os; print(sorted(os.listdir()))"
    line = f"python -c {shlex.quote(listing)}; exec python -m jobs.merge -c soup.yaml"
    done = head.submit(tree, "bash", "-c", line)
    told = done.stdout + done.stderr
    assert "'jobs'" in told
    assert "'runs'" not in told, "what .rayignore names is not sent"
    assert done.returncode == 1, told  # a submit client knows success and failure only
    assert "error: output: 'runs/soup' is relative" in told
    assert "Set storage: or ICM_RAY_STORAGE" in told
    assert "exit code 2" in told
