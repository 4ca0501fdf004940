"""Checkpoints as a data set: which steps, in which layout, and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.finetuning.trajectory import Trajectory, layout_of, read_trajectory, unflatten


def parameters(step: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    shapes = {"z.lora_A": (2, 5), "a.lora_B": (6, 2), "m.lora_A": (2, 6)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@given(st.integers(1, 300), st.integers(1, 40))
def test_checkpoints_are_spread_over_the_second_half(steps: int, count: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        kept = sorted(Trajectory(Path(folder), steps, count).steps)
    assert all(steps // 2 < step <= steps for step in kept)
    assert len(kept) == min(count, steps - steps // 2)
    if len(kept) > 1:
        assert kept[0] == steps // 2 + 1
        assert kept[-1] == steps
        gaps = np.diff(kept)
        assert gaps.max() - gaps.min() <= 1, "evenly"


@pytest.mark.parametrize(("steps", "count", "kept"), [(8, 3, {0, 4, 8}), (2, 9, {0, 1, 2})])
def test_the_whole_training_begins_before_its_first_step(
    tmp_path: Path, steps: int, count: int, kept: set[int]
) -> None:
    assert Trajectory(tmp_path, steps, count, whole=True).steps == kept


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_single_checkpoint_is_the_last_step(tmp_path: Path, steps: int) -> None:
    assert Trajectory(tmp_path, steps, 1).steps == {steps}


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    trajectory = Trajectory(tmp_path, 10, 3)
    for step in range(1, 11):
        trajectory.offer(step, step / 10, parameters(step))
    table, layout = read_trajectory(trajectory.folder)
    assert table["step"].to_pylist() == [6, 8, 10]
    assert table["loss"].to_pylist() == [0.6, 0.8, 1.0]
    assert str(table.schema.field("adapter").type) == "fixed_size_list<element: float>[34]"
    for step, row in zip((6, 8, 10), table["adapter"].to_pylist(), strict=True):
        found = unflatten(np.array(row, dtype=np.float32), layout)
        assert all(torch.equal(found[name], p) for name, p in parameters(step).items())


def test_the_layout_is_sorted_and_has_no_holes() -> None:
    layout = layout_of(parameters())
    assert [entry["name"] for entry in layout] == ["a.lora_B", "m.lora_A", "z.lora_A"]
    assert [entry["offset"] for entry in layout] == [0, 12, 24]
    assert layout == layout_of(dict(reversed(parameters().items())))


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    trajectory = Trajectory(tmp_path, 2, 1)
    trajectory.offer(2, 0.5, parameters())
    (file,) = trajectory.folder.iterdir()
    before = file.read_bytes()
    trajectory.offer(2, 0.5, parameters())
    assert file.read_bytes() == before


def test_what_a_killed_run_left_half_written_is_not_read(tmp_path: Path) -> None:
    trajectory = Trajectory(tmp_path, 2, 1)
    trajectory.offer(2, 0.5, parameters())
    (file,) = trajectory.folder.iterdir()
    (trajectory.folder / f".{file.name}.tmp").write_bytes(file.read_bytes()[:100])
    assert read_trajectory(trajectory.folder)[0].num_rows == 1
