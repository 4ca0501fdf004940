"""State of an older version of ours is read, of a newer one refused by its number and kept."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from icm_ray import checkpoint
from icm_ray.checkpoint import Checkpoint
from icm_ray.errors import InputError


def a_state(path):
    leaf = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([leaf], lr=0.1)
    leaf.sum().backward()
    optimizer.step()
    Checkpoint(path, "k").save({"w": leaf}, optimizer, [0.5])
    return leaf


def read(path):
    leaf = torch.zeros(2, requires_grad=True)
    history = Checkpoint(path, "k").load({"w": leaf}, torch.optim.AdamW([leaf], lr=0.1))
    return history, leaf


def test_a_newer_version_s_state_is_refused_and_stays(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    monkeypatch.setattr(checkpoint, "FORMAT", "2")
    leaf = a_state(path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="state of format 2 but 1 is expected"):
        read(path)
    monkeypatch.setattr(checkpoint, "FORMAT", "2")  # nothing of it was lost
    history, found = read(path)
    assert history == [0.5]
    assert torch.equal(found, leaf)


def test_a_state_from_before_there_was_a_number_is_read(tmp_path):
    path = tmp_path / "state.safetensors"
    leaf = a_state(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = {n: v for n, v in file.metadata().items() if n not in ("format", "sha256")}
    notes["sha256"] = checkpoint._digest(tensors, notes)
    save_file(tensors, path, metadata=notes)
    history, found = read(path)
    assert history == [0.5]
    assert torch.equal(found, leaf)
