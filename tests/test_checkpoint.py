"""State of a run: continued from as it was written, or not at all."""

import pytest
import torch

from icm_ray.checkpoint import Checkpoint


def run(steps):
    """Return parameters and an optimiser after some steps."""
    leaves = {"w": torch.ones(3, requires_grad=True), "never": torch.zeros(2, requires_grad=True)}
    optimizer = torch.optim.AdamW(leaves.values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (leaves["w"] ** 2).sum().backward()
        optimizer.step()
    return leaves, optimizer


@pytest.fixture
def saved(tmp_path):
    leaves, optimizer = run(3)
    checkpoint = Checkpoint(tmp_path / "state.safetensors", "k")
    checkpoint.save(leaves, optimizer, [0.5, 0.25, 0.125])
    return checkpoint


def loaded(checkpoint):
    """Return what is read back: history, values, moments."""
    leaves, optimizer = run(0)
    history = checkpoint.load(leaves, optimizer)
    moments = [m.tolist() for state in optimizer.state.values() for m in state.values()]
    return history, [leaf.tolist() for leaf in leaves.values()], moments


def test_a_state_comes_back_as_it_was(saved):
    history, values, moments = loaded(saved)
    leaves, optimizer = run(3)
    assert history == [0.5, 0.25, 0.125]
    assert values == [leaf.tolist() for leaf in leaves.values()]
    assert moments == [m.tolist() for state in optimizer.state.values() for m in state.values()]


def test_no_flipped_bit_is_ever_loaded(saved):
    """One bit of each byte in turn: the state as it was, or none of it."""
    content, whole, fresh = saved.path.read_bytes(), loaded(saved), ([], *loaded_of_nothing())
    read = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        saved.path.write_bytes(changed)
        found = loaded(saved)
        assert found in (whole, fresh), place
        read += found == whole
    assert read < 8, "of padding alone"


def loaded_of_nothing():
    leaves, _ = run(0)
    return [leaf.tolist() for leaf in leaves.values()], []


def test_no_cut_state_is_ever_loaded(saved, caplog):
    content = saved.path.read_bytes()
    for length in range(len(content)):
        saved.path.write_bytes(content[:length])
        assert loaded(saved)[0] == []
        assert not saved.path.exists()
    assert len(caplog.messages) == len(content)
    assert "damaged, so the run starts again from its beginning" in caplog.messages[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_no_number_does_not_take_the_place_of_one_that_is(saved, value):
    leaves, optimizer = run(4)
    leaves["w"].data[1] = value
    saved.save(leaves, optimizer, [0.5, 0.25, 0.125, value])
    assert loaded(saved)[0] == [0.5, 0.25, 0.125]
