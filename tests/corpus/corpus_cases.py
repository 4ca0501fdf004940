"""What a case of the corpus is, and what is asked of every one at the command's door.

Three adapters are merged, two of them good; the case spoils the third, or what is around it.
Whatever it is, no code of it runs, nothing is written but the result, no input changes and no
secret is told.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import PREFIX, changed, plain_config, plain_tensors, raw_safetensors
from command_samples import recipe_of
from safetensors.torch import save_file
from typer.testing import CliRunner

from icm_ray.cli import app
from icm_ray.errors import MAX_PROBLEM_LENGTH
from icm_ray.files import read_manifest

Spoil = Callable[[Path], Any]
CONFIG, WEIGHTS = "third/adapter_config.json", "third/adapter_model.safetensors"
"""Of the third adapter, from the folder in which a case runs."""
SECRET = "hunter2-of-the-corpus"
"""Stands in files that hostile ones point at; never to be told."""
CANARY = "exploded"
"""What code of a case would leave behind."""
ALL = {name: name for name in ("a", "b", "third")}
A0, B0 = (f"{PREFIX}layers.0.q.lora_{side}.weight" for side in "AB")


@dataclass(frozen=True)
class Case:
    """One input of the corpus and its outcome.

    Attributes:
        spoil: Makes the third adapter's good folder what it is.
        code: Exit code.
        word: What the message about it must contain; empty where nothing may be said.
        names: File that the message must name.
        adapters: What is merged, `{name: folder}`.
        recipe: Keys of the merge recipe that differ.
    """

    spoil: Spoil
    code: int
    word: str
    names: str = "third"
    adapters: Mapping[str, str] = field(default_factory=lambda: dict(ALL))
    recipe: Mapping[str, Any] = field(default_factory=dict)


def refused(word: str, spoil: Spoil, names: str = "third", code: int = 3, **more: Any) -> Case:
    """Return a case that must be rejected."""
    return Case(spoil, code, word, names, **more)


def warned(word: str, spoil: Spoil, names: str = "third", **more: Any) -> Case:
    """Return a case that is merged, but never in silence."""
    return Case(spoil, 0, word, names, **more)


def accepted(spoil: Spoil, **more: Any) -> Case:
    """Return a case that is odd and right: merged without a word."""
    return Case(spoil, 0, "", **more)


def configured(**keys: Any) -> Spoil:
    """Return what changes keys of the config; `...` removes one."""
    return lambda folder: (folder.parent / CONFIG).write_text(
        json.dumps(changed(plain_config(), keys))
    )


def key(word: str, **keys: Any) -> Case:
    """Return a case whose config alone is wrong."""
    return refused(word, configured(**keys), CONFIG)


def tensors(word: str, **keys: Any) -> Case:
    """Return a case where config and tensors contradict each other."""
    return refused(word, configured(**keys))


def told(word: str, **keys: Any) -> Case:
    """Return a case whose config is odd, and merged with a word."""
    return warned(word, configured(**keys))


def with_tensors(tensors: Mapping[str, Any]) -> Spoil:
    """Return what changes tensors; `...` removes one."""
    return lambda folder: save_file(changed(third_tensors(), tensors), folder.parent / WEIGHTS)


def with_bytes(name: str, content: bytes) -> Spoil:
    """Return what replaces a file by bytes."""
    return lambda folder: (folder.parent / name).write_bytes(content)


def with_header(header: bytes, data: bytes = b"") -> Spoil:
    """Return what replaces the weights by a header and data."""
    return lambda folder: raw_safetensors(folder.parent / WEIGHTS, header, data)


def third_tensors() -> dict[str, torch.Tensor]:
    """Return the good tensors of the third adapter, which are no other's."""
    return {name: tensor + 1 for name, tensor in plain_tensors().items()}


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a good adapter."""
    folder.mkdir(parents=True)
    (folder / Path(CONFIG).name).write_text(json.dumps(plain_config()))
    save_file(dict(tensors), folder / Path(WEIGHTS).name)
    return folder


def listed(root: Path) -> dict[str, tuple[int, int, int]]:
    """Return every path below a folder with what would change if it were written to."""
    found = {}
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            inside = 0 if name in names else status.st_mtime_ns
            found[os.path.relpath(path, root)] = (status.st_mode, status.st_ino, inside)
    return found


def hold(case: Case, root: Path) -> None:
    """Merge a case beside two good adapters and check its outcome."""
    (root / "secret").write_text(SECRET)
    plain = plain_tensors()
    folders = {
        "a": write_adapter(root / "a", plain),
        "b": write_adapter(root / "b", {name: 2 - tensor for name, tensor in plain.items()}),
        "third": write_adapter(root / "third", third_tensors()),
    }
    case.spoil(folders["third"])
    merged = {name: folders[folder] for name, folder in case.adapters.items()}
    recipe = recipe_of(root / "r.yaml", merged, **case.recipe)
    hold_command(["merge", "-c", str(recipe)], case, root)


def hold_command(words: list[str], case: Case, root: Path) -> None:
    """Run a command in a folder and check what holds for every case, and the case's outcome."""
    before = listed(root)
    done = CliRunner().invoke(app, words)
    lines = done.stderr.splitlines()
    assert done.exit_code == case.code, (lines, done.exception)
    told = [line for line in lines if case.word and case.word in line]
    assert bool(told) == bool(case.word), lines
    assert all(case.names in line for line in told), lines
    for line in lines:
        assert line.startswith(("error: ", "warning: ")), line
        assert len(line) <= MAX_PROBLEM_LENGTH + len("warning: "), line
        assert line.isprintable(), line
        assert "internal" not in line, line
    assert SECRET not in done.stdout + done.stderr
    assert not (root / CANARY).exists()
    after = listed(root)
    ours = {path for path in after if path.split(os.sep)[0] == "merged"}
    ours |= {path for path in after if path.endswith(".results.json")}
    assert {path: after[path] for path in after.keys() - ours} == before
    if case.code == 0:
        read_manifest(root / "merged")
        assert case.word or not lines, lines
    else:
        assert not (root / "merged").exists()
        assert any(line.startswith("error: ") for line in lines)


def every(cases: Mapping[str, Case]) -> Any:
    """Return the mark that runs a test once for each case of a class."""
    return pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in cases.items()])
