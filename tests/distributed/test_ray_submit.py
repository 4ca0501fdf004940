"""`ray job submit` to a head that is really started, with a token."""

import json
import os
import shlex
import urllib.error
from pathlib import Path

import pytest
from ray_heads import copy_tree, started
from ray_samples import hashes, merge_recipe, write_yaml
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
    copy_tree(folder)
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
