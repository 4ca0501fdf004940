"""Trajectories to vectors: PEFT's names and scaling, ranks that differ, the Arrow table."""

import numpy as np
import pytest
import torch

from icm_ray.config import RepresentationSpec
from icm_ray.errors import InputError
from icm_ray.finetuning.trajectory import Trajectory
from icm_ray.fusion.data import FusionTable, read_table, samples_of, write_table
from icm_ray.fusion.serial import Checkpoints
from icm_ray.fusion_vae.layout import Layout, distance, norm
from icm_ray.types import LoRAFactors


@pytest.fixture
def expert(make_adapter, adapter_around, tmp_path):
    """An adapter of scaling 2 and its trajectory: four checkpoints, the last one itself."""
    plain = make_adapter("law", rank=2, scaling=2.0)
    keeper = Trajectory(tmp_path, steps=8, count=4)
    for step in range(1, 9):
        raw = {}
        for module, f in plain.modules.items():
            raw[f"base_model.model.{module}.lora_A.weight"] = f.a * step / 8
            raw[f"base_model.model.{module}.lora_B.weight"] = f.b / f.scaling
        keeper.offer(step, 0.5, raw)
    return plain, keeper.folder


def test_a_trajectory_is_read_with_its_scaling(expert) -> None:
    adapter, folder = expert
    samples = samples_of(adapter, folder)
    assert [sample.step for sample in samples] == [5, 6, 7, 8]
    assert [sample.is_final for sample in samples] == [False, False, False, True]
    for sample in samples:
        wanted = {m: LoRAFactors(f.a * sample.step / 8, f.b) for m, f in adapter.modules.items()}
        assert distance(sample.modules, wanted) < 1e-5 * norm(wanted)
    assert [s.is_final for s in samples_of(adapter)] == [True]


def test_another_adapters_trajectory_is_refused(expert, make_adapter, tmp_path) -> None:
    _, folder = expert
    other = make_adapter("other", shapes={"layer.0.q": (7, 5)})
    with pytest.raises(InputError, match="Name the trajectory of this adapter"):
        samples_of(other, folder)
    with pytest.raises(InputError, match="no trajectory there"):
        samples_of(other, tmp_path / "nowhere")


def test_the_table_survives_arrow(samples, vectors, tmp_path) -> None:
    layout = Layout.fit(RepresentationSpec(), samples)
    table = FusionTable.of(layout, samples[::-1], vectors)
    assert table.names == ("code", "law", "med")
    assert [table.steps[row] for row in table.rows_of("law")] == [1, 2, 3, 4, 5]
    assert table.is_final[table.final_of("law")]
    write_table(table, tmp_path / "table.parquet")
    again = read_table(tmp_path / "table.parquet")
    assert torch.equal(again.x, table.x)
    assert torch.equal(again.v, table.v)
    arrow = table.to_arrow()
    assert arrow.column_names == ["task", "step", "l", "v", "split"]
    shuffled = arrow.take(np.random.default_rng(0).permutation(arrow.num_rows))
    found = FusionTable.from_arrow(shuffled)
    assert (found.tasks, found.steps, found.is_final) == (table.tasks, table.steps, table.is_final)
    assert torch.equal(found.x, table.x)
    with pytest.raises(InputError, match="no column v"):
        FusionTable.from_arrow(arrow.drop_columns(["v"]))
    with pytest.raises(InputError, match="none of med"):
        FusionTable.of(layout, samples, {t: vectors[t] for t in ("code", "law")})


def test_a_task_can_be_told_anothers_vector_or_none(adapters, samples, vectors) -> None:
    known, names = Checkpoints(samples, vectors), sorted(vectors)

    def told(which: str) -> dict[str, torch.Tensor]:
        spec = RepresentationSpec(components=8, task_vectors=which)
        _, table = known.encoded(spec, adapters)
        return {name: table.v[table.final_of(name)] for name in names}

    own, shuffled = told("own"), told("shuffled")
    assert all(torch.equal(own[name], vectors[name]) for name in names)
    assert all(
        torch.equal(shuffled[name], vectors[names[index - 1]]) for index, name in enumerate(names)
    )
    assert not any(vector.any() for vector in told("none").values())


@pytest.mark.parametrize(
    ("count", "steps"),
    [(None, (1, 2, 3, 4, 5)), (0, (5,)), (1, (4, 5)), (2, (1, 4, 5)), (9, (1, 2, 3, 4, 5))],
)
def test_a_recipe_takes_fewer_checkpoints(adapters, samples, vectors, count, steps) -> None:
    spec = RepresentationSpec(components=8, checkpoints=count)
    _, table = Checkpoints(samples, vectors).encoded(spec, adapters)
    for task in table.names:
        assert tuple(table.steps[row] for row in table.rows_of(task)) == steps
        assert table.steps[table.final_of(task)] == 5
