"""Adapters that are elsewhere: in the Hugging Face cache, or in a pickle that somebody allows."""

import hashlib
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from adapter_samples import plain_config, plain_tensors

from icm_ray.adapters import open_adapter, unpickled
from icm_ray.adapters.formats.unpickle import read_tensors
from icm_ray.errors import InputError

COMMIT = "a" * 40


def problems_of(path):
    with pytest.raises(InputError) as error:
        open_adapter(path)
    return error.value.problems


def hub_cache(root, repository, revision, files):
    """Lay out a Hugging Face cache by hand: refs/main, one snapshot."""
    base = root / ("models--" + repository.replace("/", "--"))
    snapshot = base / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(revision)
    for file in files.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the folder of an empty Hugging Face cache, with the hub out of reach."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_repository_in_the_local_cache_is_read_from_there(make_folder, cache):
    snapshot = hub_cache(cache, "org/tuned", COMMIT, make_folder())
    for spec in ("org/tuned", f"org/tuned@{COMMIT}"):
        file = open_adapter(spec)
        assert (file.name, file.path) == ("tuned", snapshot)
        assert file.fingerprint == open_adapter(make_folder()).fingerprint


def test_a_repository_that_is_not_there_says_how_to_have_it_fetched(cache):
    assert "name org/none@REVISION to have it fetched" in problems_of("org/none")[0]
    assert "the hub did not give it" in problems_of("org/none@main")[0]
    assert "no such folder" in problems_of("../org/none@main")[0]


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository: `files` are its contents, `asked` is what was fetched."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[set[str]] = set()

    def do_GET(self):
        if self.path.startswith("/api/models/org/tuned/"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                for name, data in self.files.items()
            ]
            siblings = [{"rfilename": name} for name in self.files]
            whole = {"id": "org/tuned", "sha": COMMIT, "siblings": siblings}
            self.reply(json.dumps(listed if "/tree/" in self.path else whole).encode())
        elif (name := self.path.rpartition("/")[2]) in self.files:
            self.asked |= {name} if self.command == "GET" else set()
            self.reply(self.files[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def reply(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(cache, monkeypatch, make_folder):
    """Serve an adapter, a pickle and a script as a repository on this machine."""
    import huggingface_hub.constants as constants

    Hub.files = {file.name: file.read_bytes() for file in make_folder().iterdir()}
    Hub.files |= {"adapter_model.bin": b"pickle", "setup.py": b"code"}
    Hub.asked = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    yield Hub
    server.shutdown()
    server.server_close()


def test_only_a_named_revision_is_fetched_and_only_what_an_adapter_needs(hub, cache, make_folder):
    assert "name org/tuned@REVISION" in problems_of("org/tuned")[0]
    assert hub.asked == set()
    file = open_adapter("org/tuned@main")
    assert file.path.is_relative_to(cache)
    assert file.fingerprint == open_adapter(make_folder()).fingerprint
    assert hub.asked == {"adapter_config.json", "adapter_model.safetensors"}
    hub.asked.clear()
    assert open_adapter("org/tuned@main").path == file.path
    assert hub.asked == set(), "the second time it comes from the cache"


def pickled_folder(path, value):
    path.mkdir()
    torch.save(value, path / "adapter_model.bin")
    (path / "adapter_config.json").write_text(json.dumps(plain_config()))
    return path


def test_an_allowed_pickle_is_the_same_adapter_and_converted_once(tmp_path, make_folder):
    folder = pickled_folder(tmp_path / "pickled", plain_tensors())
    copy = unpickled(folder, tmp_path / "cache")
    assert open_adapter(copy).fingerprint == open_adapter(make_folder()).fingerprint
    changed = (copy / "adapter_model.safetensors").stat().st_mtime_ns
    assert unpickled(folder, tmp_path / "cache") == copy
    assert (copy / "adapter_model.safetensors").stat().st_mtime_ns == changed


def test_folders_that_need_no_unpickling_stay_as_they_are(tmp_path, make_folder):
    folder = make_folder()
    (folder / "adapter_model.bin").write_bytes(b"never read")
    assert unpickled(folder, tmp_path / "cache") == folder
    assert unpickled(tmp_path / "none", tmp_path / "cache") == tmp_path / "none"


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


PICKLES = {
    "list": lambda _: [torch.ones(2)],
    "nested": lambda _: {"a": {"b": torch.ones(2)}},
    "expanded": lambda _: {"a": torch.ones(1).expand(2**40)},
    "sparse": lambda _: {"a": torch.ones(2).to_sparse()},
    "code": lambda path: {"a": Touch(path)},
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_nothing(tmp_path, case):
    torch.save(PICKLES[case](tmp_path / "touched"), tmp_path / "adapter_model.bin")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        read_tensors(tmp_path / "adapter_model.bin")
    assert not (tmp_path / "touched").exists()


def test_a_plain_pickle_that_torch_did_not_write_is_refused(tmp_path):
    folder = pickled_folder(tmp_path / "pickled", {})
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Touch(tmp_path / "touched")}))
    with pytest.raises(InputError, match=r"not read .*but a pickle of tensors alone"):
        unpickled(folder, tmp_path / "cache")
    assert not (tmp_path / "touched").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
