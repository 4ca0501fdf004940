"""The second half of training, or all of it, as a Parquet data set, one row a checkpoint.

Columns: `step` int64, `loss` float64, `adapter` fixed_size_list<float32>[D]. The flat layout of
`adapter` (tensor name, shape, offset, in sorted order of names) is JSON in the schema's metadata.
ICM-Fusion trains its F-VAE on these rows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from icm_ray.adapters.contents import PREFIX
from icm_ray.errors import InputError
from icm_ray.types import Adapter, LoRAFactors

FOLDER = "trajectory"
A, B = ".lora_A.weight", ".lora_B.weight"
Item = TypeVar("Item")


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Return up to `count` items from the first to the last; of one, the first."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


class Trajectory:
    """Keeps `count` evenly spaced checkpoints of the second half of `steps`, or of all of them."""

    def __init__(self, scratch: Path, steps: int, count: int, *, whole: bool = False) -> None:
        first = 0 if whole else steps // 2 + 1
        count = min(count, steps + 1 - first)
        wanted = np.linspace(first if count > 1 else steps, steps, num=count)
        self.steps = frozenset(np.round(wanted).astype(int).tolist())
        self.folder = scratch / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)

    def offer(self, step: int, loss: float, parameters: Mapping[str, Tensor]) -> None:
        """Write a checkpoint if this step is one of those to keep; 0 is before the first.

        `loss` is that of the step's batch, NaN at 0. One small file a checkpoint: a killed run has
        lost nothing, and writing it again after a resume gives the same bytes.
        """
        if step not in self.steps:
            return
        layout = layout_of(parameters)
        parts = [parameters[entry["name"]].detach().cpu().numpy().ravel() for entry in layout]
        flat = np.concatenate(parts)
        adapter = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), flat.size)
        columns = {"step": pa.array([step]), "loss": pa.array([loss]), "adapter": adapter}
        table = pa.table(columns).replace_schema_metadata({"layout": json.dumps(layout)})
        path = self.folder / f"step-{step:06d}.parquet"
        temporary = self.folder / f".{path.name}.tmp"  # readers of the data set skip dot files
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)


def layout_of(parameters: Mapping[str, Tensor]) -> list[dict]:
    """Return name, shape and offset of each tensor in the flat vector, sorted by plain name."""
    layout, offset = [], 0
    for name in sorted(parameters):
        shape = list(parameters[name].shape)
        layout.append({"name": name, "shape": shape, "offset": offset})
        offset += parameters[name].numel()
    return layout


def read_trajectory(folder: Path) -> tuple[pa.Table, list[dict]]:
    """Return all checkpoints in step order and the flat layout of their `adapter` column."""
    # Named one by one: a finished folder holds a manifest too.
    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    table = pq.read_table(files).sort_by("step")
    return table, json.loads(table.schema.metadata[b"layout"])


def unflatten(row: np.ndarray, layout: list[dict]) -> dict[str, Tensor]:
    """Return the tensors of one checkpoint by name."""
    tensors = {}
    for entry in layout:
        size = int(np.prod(entry["shape"]))
        flat = row[entry["offset"] : entry["offset"] + size]
        tensors[entry["name"]] = torch.from_numpy(flat.reshape(entry["shape"]).copy())
    return tensors


def checkpoints_of(
    adapter: Adapter, trajectory: Path
) -> Iterator[tuple[int, dict[str, LoRAFactors]]]:
    """Yield step and factors of every checkpoint of an adapter, in step order.

    Raises:
        InputError: there are none, or they are another adapter's: modules or shapes differ.
    """
    if not list(trajectory.glob("*.parquet")):
        raise InputError(f"{trajectory}: no trajectory there. Train with jobs.finetune.")
    table, layout = read_trajectory(trajectory)
    width = table.schema.field("adapter").type.list_size
    rows = table["adapter"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    for step, row in zip(table["step"].to_pylist(), rows, strict=True):
        yield step, _factors(unflatten(row, layout), adapter, trajectory)


def _factors(tensors: Mapping[str, Tensor], adapter: Adapter, path: Path) -> dict[str, LoRAFactors]:
    factors = {}
    for module, final in adapter.modules.items():
        a, b = (tensors.get(f"{PREFIX}{module}{end}") for end in (A, B))
        if a is None or b is None or (b.shape[0], a.shape[1]) != final.shape:
            raise InputError(
                f"{path}: no factors of {adapter.name!r}'s module {module} in the adapter's shape. "
                "Name the trajectory of this adapter."
            )
        factors[module] = LoRAFactors(a, b * final.scaling, final.scaling)
    return factors
