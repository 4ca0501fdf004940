"""A cluster of our own is reached by nobody else; an open one is joined by who says so."""

import json
import logging
import os
import socket
import subprocess
import sys

import pytest
import ray
from command_samples import recipe_of, save_lora
from ray_samples import ROOT, environment, run

from icm_ray.config import INSECURE_VARIABLE
from icm_ray.distributed import is_joining, joining
from icm_ray.errors import ClusterError, RecipeError

OWN_RAY = True
LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1", "::1")


@pytest.fixture
def outside(monkeypatch):
    """The environment of a user's shell, and no cluster that is really joined."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", INSECURE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(joining.RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    return monkeypatch


@pytest.fixture
def nobody():
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
def test_a_local_ray_listens_on_the_loopback_interface_alone():
    script = str(ROOT / "tests" / "distributed" / "listening.py")
    done = subprocess.run(
        [sys.executable, script], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    names = {name for name, _ in found["sockets"]}
    assert {"gcs_server", "raylet"} <= names
    assert any("Dashboard" in name for name in names)
    assert any("RuntimeEnv" in name for name in names)
    assert len(found["sockets"]) >= 9
    assert [one for one in found["sockets"] if one[1] not in LOOPBACK] == []
    assert found["mode"] == "token"


def test_the_setting_that_keeps_ray_at_home_is_one_that_ray_knows():
    constants = ray._private.ray_constants
    assert os.environ[constants.ENABLE_RAY_CLUSTERS_ENV_VAR] == "0"
    assert constants.ENABLE_RAY_CLUSTER is False
    assert ray.util.get_node_ip_address() in LOOPBACK


def test_a_local_ray_that_does_not_come_up_is_a_fault_of_the_cluster(tmp_path):
    """Ray's temporary folder is a file here."""
    (tmp_path / "file").touch()
    script = (
        "import sys; from icm_ray.command import guarded; from icm_ray.config import Resources; "
        "from icm_ray.distributed.cluster import connected\n"
        "def work():\n  with connected(Resources()):\n    return {}\n"
        "sys.exit(guarded(work, debug=False)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(RAY_TMPDIR=str(tmp_path / "file")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 5, done.stderr
    assert "error: Ray: no local cluster came up (" in done.stderr


@pytest.mark.parametrize(
    ("value", "joins"),
    [(None, False), ("", False), ("local", False), ("auto", True), ("h:1", True)],
)
def test_what_ray_address_asks_for(monkeypatch, value, joins):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert is_joining() is joins


@pytest.mark.parametrize("mode", [None, "disabled", ""])
def test_an_open_cluster_is_not_joined_from_outside(outside, nobody, mode):
    if mode is not None:
        outside.setenv("RAY_AUTH_MODE", mode)
    for value in (None, "", "0"):
        if value is not None:
            outside.setenv(INSECURE_VARIABLE, value)
        with pytest.raises(RecipeError, match="--insecure-cluster or ICM_RAY_INSECURE_CLUSTER=1"):
            joining.join(f"ray://user:hunter2@{nobody}")
    with pytest.raises(RecipeError) as caught:
        joining.join(f"ray://user:hunter2@{nobody}")
    assert "hunter2" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("door", [INSECURE_VARIABLE, joining.RAY_JOB_CONFIG_JSON_ENV_VAR])
def test_who_says_so_or_is_inside_already_is_warned_once(outside, caplog, nobody, door):
    outside.setenv(door, "1")
    with (
        caplog.at_level(logging.WARNING, joining.__name__),
        pytest.raises(ClusterError, match="nobody answers"),
    ):
        joining.join(nobody)
    (record,) = caplog.records
    assert "anyone who reaches it can run code" in record.message


def test_a_cluster_that_does_not_answer_is_said_at_once(outside, nobody):
    """Ray itself would go on asking for more than five minutes."""
    outside.setenv("RAY_AUTH_MODE", "token")
    outside.setenv("RAY_AUTH_TOKEN", "a" * 64)
    for name in (nobody, f"ray://{nobody}"):
        with pytest.raises(ClusterError, match=f"RAY_ADDRESS: {name}: nobody answers"):
            joining.join(name)


@pytest.mark.parametrize(("mode", "told"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o644, 1)])
def test_a_token_that_others_can_read_is_said(outside, caplog, tmp_path, nobody, mode, told):
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(mode)
    outside.setenv("RAY_AUTH_MODE", "token")
    outside.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with (
        caplog.at_level(logging.WARNING, joining.__name__),
        pytest.raises(ClusterError, match="nobody answers"),
    ):
        joining.join(nobody)
    assert [r.message for r in caplog.records] == [
        f"{token}: a token that other users can read. Run chmod 600 on it."
    ] * told


@pytest.mark.slow
def test_a_job_says_so_with_code_2_and_its_flag_opens_the_door(tmp_path, nobody):
    adapters = {name: save_lora(tmp_path / name, seed) for seed, name in enumerate("ab")}
    words = ["jobs.merge", "-c", str(recipe_of(tmp_path / "r.yaml", adapters))]
    done = run(*words, RAY_ADDRESS=nobody)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: RAY_ADDRESS: {nobody}: no token (RAY_AUTH_MODE=token)")
    done = run(*words, "--insecure-cluster", RAY_ADDRESS=nobody)
    assert done.returncode == 5, done.stderr
    assert "nobody answers" in done.stderr
