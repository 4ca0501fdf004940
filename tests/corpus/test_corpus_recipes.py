"""Class: recipes that are no plain YAML, and outputs that hold something of somebody else."""

import json
import os
import pickle
from pathlib import Path

import pytest
from corpus_cases import CANARY, SECRET, Case, every, hold, hold_command, refused
from test_corpus_files import Bomb

PLAIN = """\
adapters: [{name: a, path: a}, {name: third, path: third}]
method: soup
output: {path: merged}
"""


def text(word: str, content: str | bytes) -> Case:
    """Return a case whose recipe is this and whose adapters are good."""
    data = content if isinstance(content, bytes) else content.encode()
    return refused(word, lambda folder: (folder.parent / "r.yaml").write_bytes(data), "r.yaml", 2)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES = {
    "yaml_apply": text(
        "not plain YAML", f"{PLAIN}params: {{x: !!python/object/apply:os.mkdir [{CANARY}]}}\n"
    ),
    "yaml_name": text("not plain YAML", f"{PLAIN}params: {{x: !!python/name:os.mkdir x}}\n"),
    "yaml_billion_laughs": text("aliases", LAUGHS),
    "yaml_deep": text("nested too deeply", "a: " + "[" * 400_000),
    "yaml_tabs": text("not plain YAML", "adapters:\n\t- a\n"),
    "yaml_list_root": text("list but a table of keys is expected", "- a\n"),
    "yaml_empty": text("a table of keys is expected", ""),
    "yaml_utf16": text("not UTF-8", PLAIN.encode("utf-16")),
    "yaml_nul": text("not plain YAML", f'{PLAIN}params: {{x: "\0"}}\n'),
    "yaml_typo": text("Did you mean 'method'?", PLAIN.replace("method", "metod")),
    "yaml_twice": text("method: twice", f"{PLAIN}method: svd\n"),
    "yaml_two_documents": text("not plain YAML", f"{PLAIN}---\n{PLAIN}"),
    "yaml_secret": text("unknown key", f"{PLAIN}hf_token: {SECRET}\n"),
    "yaml_secret_of_a_wrong_type": text("params: ", f"{PLAIN}params: [{SECRET}]\n"),
}


def test_a_template_is_no_value(tmp_path, monkeypatch):
    """An interpolation of another tool stays the text it is."""
    monkeypatch.chdir(tmp_path)
    params = {"method": "task_arithmetic", "params": {"scale": "${oc.env:HOME}"}}
    hold(refused("a valid number", lambda _: None, "params.scale", 2, recipe=params), tmp_path)


@pytest.mark.timeout(30)
@every(RECIPES)
def test_recipes(case, tmp_path, monkeypatch):
    from adapter_samples import plain_tensors
    from corpus_cases import third_tensors, write_adapter

    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a", plain_tensors())
    case.spoil(write_adapter(tmp_path / "third", third_tensors()))
    hold_command(["merge", "-c", "r.yaml"], case, tmp_path)


def holding(name: str, content: bytes):
    """Return what puts a file of somebody else into the folder of the output."""

    def spoil(folder: Path) -> None:
        (folder.parent / "out").mkdir()
        (folder.parent / "out" / name).write_bytes(content)

    return spoil


def linked(folder: Path) -> None:
    (folder.parent / "real").mkdir()
    (folder.parent / "out").symlink_to("real")


def half_written(folder: Path) -> None:
    """As a killed run of something else may leave it: a manifest of files that are not there."""
    holding("manifest.json", json.dumps({"files": {"adapter_model.safetensors": "0"}}).encode())(
        folder
    )
    (folder.parent / "out" / "adapter_model.safetensors.tmp").write_bytes(b"half")


def taken(word: str, spoil: object) -> Case:
    """Return a case whose output is there already, made by `spoil`."""
    return refused(word, spoil, "out", recipe={"output": {"path": "out"}})


def place(word: str, path: str, names: str = "output", code: int = 3) -> Case:
    """Return a case whose output can be nowhere."""
    return refused(word, lambda _: None, names, code, recipe={"output": {"path": path}})


PICKLE = pickle.dumps(Bomb())
OUTPUTS = {
    "out_users_files": taken("did not write (thesis.tex", holding("thesis.tex", b"x")),
    "out_is_a_file": taken("exists and is no folder", lambda f: (f.parent / "out").touch()),
    "out_is_a_link": taken("exists and is no folder", linked),
    "out_dangling": taken("is no folder", lambda f: (f.parent / "out").symlink_to("nowhere")),
    "out_is_a_pipe": taken("exists and is no folder", lambda f: os.mkfifo(f.parent / "out")),
    "out_planted_deepspeed": taken("did not write", holding("mp_rank_00_model_states.pt", PICKLE)),
    "out_planted_tuner": taken("did not write", holding("tuner.pkl", PICKLE)),
    "out_half_written": taken("did not write", half_written),
    "out_is_an_input": place("is the adapter 'third'", "third"),
    "out_holds_an_input": place("holds the adapter", "."),
    "out_in_an_input": place("lies in the adapter", "third/x"),
    "out_nul": place("holds a NUL", "x\0y", code=2),
    "out_root": place("the path of a folder", "/", code=2),
    "out_long": place("the path of a folder", "n" * 300, code=2),
    "out_proc": place("cannot be written", "/proc/x", "/proc/x"),
    "out_null": place("exists and is no folder", "/dev/null", "/dev/null"),
}


@pytest.mark.timeout(30)
@every(OUTPUTS)
def test_outputs(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hold(case, tmp_path)
