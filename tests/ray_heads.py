"""A Ray that is really started, with a token, and jobs that are submitted to it.

The head listens on ports of its own and is ended by its process id: `ray stop` would end every
Ray on the machine.
"""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray_samples import ROOT, environment

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TOKEN = "a" * 64


@dataclass(frozen=True)
class Head:
    """A cluster of one node.

    Attributes:
        address: Of its dashboard.
        metrics: Where Prometheus reads.
        env: Environment of whoever may use it.
        process: `ray start`; all of the node's processes are below it.
    """

    address: str
    metrics: str
    env: dict[str, str]
    process: psutil.Process

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def ask(self, path: str = "nodes?view=summary", token: str | None = TOKEN) -> Any:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.address}/{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def submission(self, *words: str) -> list[str]:
        options = ["--address", self.address, "--working-dir", "."]
        return [*RAY, "job", "submit", *options, "--", *words]

    @property
    def sender(self) -> dict[str, str]:
        """Environment without our own source on the path: the job runs the copy that is sent."""
        return {name: value for name, value in self.env.items() if name != "PYTHONPATH"}

    def submit(self, tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.submission(*words),
            cwd=tree,
            env=self.sender,
            capture_output=True,
            text=True,
            timeout=300,
        )


def copy_tree(folder: Path, *skipped: str) -> None:
    """Copy what a user submits, since a file that changes meanwhile breaks the upload."""
    skip = shutil.ignore_patterns("__pycache__", *skipped)
    for name in ("icm_ray", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / ".rayignore", folder)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Head]:
    """Start a head, with its log and token in a folder, and end what is left of it."""
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
    log = folder / "head.log"
    with log.open("w") as file:
        process = psutil.Popen(
            [*RAY, "start", "--head", *words, "--disable-usage-stats", "--block"],
            cwd=folder,
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    head = Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}", env, process)
    everyone = []
    try:
        _wait(head, log)
        yield head
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone = head.processes()[1:]
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(everyone, timeout=30)
        for one in alive:
            one.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def _wait(head: Head, log: Path) -> None:
    deadline = time.monotonic() + 180
    while head.process.is_running():
        assert time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(OSError, KeyError):
            if any(node.get("agent") for node in head.ask()["data"]["summary"]):
                return
        time.sleep(1)
    raise AssertionError(log.read_text())


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
