"""Class: what lies where files of an adapter should: pickles, links, pipes, nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from corpus_cases import CANARY, CONFIG, WEIGHTS, Case, accepted, every, hold, refused

NAMES = {"config": CONFIG, "weights": WEIGHTS}
INDEX = f"{WEIGHTS}.index.json"


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __reduce__(self):
        return open, (CANARY, "w")


def pickled(name: str, save: Callable[[object, Path], None]):
    """Return what writes a pickle with code of its own as one of the files."""

    def spoil(folder: Path) -> None:
        if "safetensors" in name or name == "adapter_model.bin":
            (folder.parent / WEIGHTS).unlink()
        save({"weight": Bomb()}, folder / name)

    return spoil


def old(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def replaced(name: str, make: Callable[[Path], object]):
    """Return what puts something else where a file was."""

    def spoil(folder: Path) -> None:
        path = folder.parent / name
        path.unlink()
        make(path)

    return spoil


def no_file(word: str, make: Callable[[Path], object]) -> dict[str, Case]:
    return {kind: refused(word, replaced(name, make), name) for kind, name in NAMES.items()}


ODD = {
    "missing": no_file("missing but", lambda path: None),
    "weights_folder": no_file("a folder but", Path.mkdir),
    "weights_fifo": no_file("a pipe, socket or device but", os.mkfifo),
    "weights_device": no_file(
        "a pipe, socket or device but", lambda path: path.symlink_to("/dev/zero")
    ),
    "link_loop": no_file("cannot be opened", lambda path: path.symlink_to(path)),
    "link_dangling": no_file("a dangling link but", lambda path: path.symlink_to("nowhere")),
    "link_secret": {
        kind: refused(
            word, replaced(NAMES[kind], lambda path: path.symlink_to("../secret")), NAMES[kind]
        )
        for kind, word in (("config", "not JSON"), ("weights", "a safetensors file is expected"))
    },
}


def sharded(place: str):
    """Return what makes the weights a shard, and an index that puts its tensors at `place`."""

    def spoil(folder: Path) -> None:
        from corpus_cases import third_tensors

        (folder.parent / WEIGHTS).rename(folder / "adapter_model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(third_tensors(), place)}
        (folder.parent / INDEX).write_text(json.dumps(index))

    return spoil


def elsewhere(word: str, place: str) -> Case:
    return refused(word, sharded(place), INDEX)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def cached(folder: Path) -> None:
    """As the hub's client keeps a repository: links into a folder of blobs."""
    blobs = folder / "blobs"
    blobs.mkdir()
    for number, file in enumerate([path for path in folder.iterdir() if path.is_file()]):
        file.rename(blobs / str(number))
        file.symlink_to(Path("blobs") / str(number))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


CASES = {
    **{f"{name}-{kind}": case for name, kinds in ODD.items() for kind, case in kinds.items()},
    "pickle_exec_bin": refused("onvert", pickled("adapter_model.bin", old), "third"),
    "pickle_exec_zip": refused("onvert", pickled("adapter_model.bin", torch.save), "third"),
    "pickle_exec_safetensors": refused("a pickle", pickled(Path(WEIGHTS).name, old), WEIGHTS),
    "pickle_exec_safetensors_zip": refused(
        "a pickle (zip)", pickled(Path(WEIGHTS).name, torch.save), WEIGHTS
    ),
    "pickle_beside_weights": accepted(pickled("optimizer.pt", torch.save)),
    "ok_training_args": accepted(pickled("training_args.bin", old)),
    "tokenizer_pickle": accepted(pickled("tokenizer.pkl", old)),
    "index_outside": elsewhere("a file beside the index", "../secret"),
    "index_absolute": elsewhere("a file beside the index", "/etc/passwd"),
    "index_missing_shard": refused(
        "missing", sharded("adapter_model-00002-of-00002.safetensors"), "third"
    ),
    "ok_index": accepted(sharded("adapter_model-00001-of-00001.safetensors")),
    "ok_hub_cache_links": accepted(cached),
    "adapter_absent": refused("no such folder", shutil.rmtree),
    "adapter_is_a_file": refused("a safetensors file is expected", a_file),
    "empty_folder": refused("missing but a PEFT adapter folder holds it", empty),
}


@pytest.mark.timeout(20)
@every(CASES)
def test_files(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hold(case, tmp_path)
