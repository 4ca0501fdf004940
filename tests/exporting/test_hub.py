"""`icm-ray push`: what would go to the hub, and what huggingface_hub's client sends one."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from icm_ray.adapters import save_adapter
from icm_ray.files import read_manifest


class Hub(BaseHTTPRequestHandler):
    """Answers the client as the hub does where no file is large."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        seen = self.server.seen
        seen.append((self.path, self.headers["Authorization"], body))
        if self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.address}/org/both", "id": "org/both"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.answer({"files": modes})
        elif "/branch/" in self.path:
            self.answer({})
        else:
            at = f"{self.server.address}/org/both/commit/1234"
            self.answer({"success": True, "commitOid": "1234", "commitUrl": at, "hookOutput": ""})

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Authorization"], b""))
        self.answer({})

    def answer(self, content) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_words) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.seen = f"http://127.0.0.1:{server.server_port}", []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path, make_adapter):
    made = tmp_path / "both"
    save_adapter(make_adapter("both"), made)
    (made / "run.json").write_text('{"host": "mine"}')
    return made


def test_a_dry_run_says_all_and_sends_nothing(cli, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HOME", str(folder.parent))
    code, text, stderr = cli("push", folder, "--to", "org/both", "--private", "--dry-run")
    assert code == 0
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert f"{size:,}  adapter_model.safetensors" in text
    assert "manifest.json" in text
    assert "run.json" not in text, "has the host's name in it"
    assert "to org/both, private if it is new" in text
    assert "nothing was uploaded" in text
    assert "no license" in stderr


def test_what_is_not_as_it_was_written_is_refused(cli, folder):
    with (folder / "adapter_config.json").open("a") as file:
        file.write(" ")
    code, _, stderr = cli("push", folder, "--to", "org/both", "--dry-run")
    assert code == 3
    assert "adapter_config.json: sha256 differs from manifest.json" in stderr
    code, _, stderr = cli("push", folder, "--to", "both", "--dry-run")
    assert code == 2
    assert "--to: 'both' but org/name is expected" in stderr


def push(hub, folder, *words, **variables):
    command = [sys.executable, "-m", "icm_ray", "push", str(folder), "--to", "org/both", *words]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_one_commit_holds_every_file_of_the_manifest(hub, folder):
    done = push(hub, folder, "--revision", "v1", "--private", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert f"uploaded, {hub.address}/org/both/commit/1234" in done.stdout
    paths = [path for path, _, _ in hub.seen]
    assert paths[0] == "/api/repos/create"
    assert json.loads(hub.seen[0][2])["name"] == "both"
    assert "/api/models/org/both/branch/v1" in paths
    assert all(token == "Bearer hf_secret" for path, token, _ in hub.seen if "/commit/" in path)
    (commit,) = [body for path, _, body in hub.seen if path.endswith("/commit/v1")]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    assert sent.keys() == {*read_manifest(folder)["files"], "manifest.json"}
    assert all(content == (folder / name).read_bytes() for name, content in sent.items())
    assert "hf_secret" not in done.stdout + done.stderr
