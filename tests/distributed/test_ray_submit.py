"""`ray job submit` to a head that is really started, with a token.

The head listens on ports of its own and is ended by its process id: `ray stop` would end every
Ray on the machine.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from ray_samples import ROOT, environment, hashes, merge_recipe, write_yaml
from typer.testing import CliRunner

from icm_ray.cli import app

OWN_RAY = True
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TOKEN = "a" * 64


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ask(address, token):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{address}/nodes?view=summary", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Address and environment of a cluster of one node that asks for a token."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    temporary = tempfile.mkdtemp(prefix="ir", dir="/tmp")  # Ray's socket paths must be short
    env = environment(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0"
    )
    gcs, dashboard, agent, metrics, client = free_ports(5)
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics,
        "ray-client-server-port": client,
        "dashboard-host": "127.0.0.1",
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "object-store-memory": 200_000_000,
        "temp-dir": temporary,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        [*RAY, "start", "--head", *words, "--disable-usage-stats", "--block"],
        cwd=folder,
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            try:
                if any(n.get("agent") for n in ask(address, TOKEN)["data"]["summary"]):
                    break
            except (OSError, KeyError):
                pass
            time.sleep(1)
        yield address, env
    finally:
        everyone = [process.pid and psutil.Process(process.pid)]
        everyone += everyone[0].children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(everyone[1:], timeout=30)
        for one in alive:
            one.kill()
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a user submits, since a file that changes meanwhile breaks the upload."""
    folder = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__", "*.parquet")
    for name in ("icm_ray", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / ".rayignore", folder)
    (folder / "runs").mkdir()
    (folder / "runs" / "large.bin").write_bytes(os.urandom(1000))
    return folder


def submit(head, tree, *words):
    address, env = head
    return subprocess.run(
        [*RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *words],
        cwd=tree,
        # Without our own source on the path, so that the job runs the copy that was sent.
        env={name: value for name, value in env.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_strangers_are_turned_away(head):
    for token in (None, "b" * 64):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(head[0], token)
        assert caught.value.code in (401, 403)
        caught.value.close()


def test_a_submitted_merge_writes_under_storage(head, tree, adapters, tmp_path):
    recipe = write_yaml(tree / "svd.yaml", merge_recipe(adapters, Path("runs/svd"), method="svd"))
    line = ["python", "-m", "jobs.merge", "-c", "svd.yaml"]
    done = submit(head, tree, *line, f"storage={tmp_path}")
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
    done = submit(head, tree, "bash", "-c", line)
    told = done.stdout + done.stderr
    assert "'jobs'" in told
    assert "'runs'" not in told, "what .rayignore names is not sent"
    assert done.returncode == 1, told  # a submit client knows success and failure only
    assert "error: output: 'runs/soup' is relative" in told
    assert "Set storage: or ICM_RAY_STORAGE" in told
    assert "exit code 2" in told
