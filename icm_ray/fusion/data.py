"""What a Fusion-VAE is trained on: trajectories and finals of every task, one Arrow table.

Columns: `task` string, `step` int64, `l` fixed_size_list<float32>[D] (see `vae.layout`), `v`
fixed_size_list<float32>[d_v] (the task vector), `split` "final" for the finished adapters and
"trajectory" for what came before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.finetuning.trajectory import checkpoints_of
from icm_ray.fusion_vae.layout import Layout, Sample
from icm_ray.types import Adapter

FINAL, BEFORE = "final", "trajectory"


def samples_of(adapter: Adapter, trajectory: Path | None = None) -> list[Sample]:
    """Return a task's checkpoints in step order, the finished adapter last.

    The trajectory's last row is the adapter itself, before it was stored, and is left out.

    Raises:
        InputError: the trajectory is another adapter's: modules or shapes differ.
    """
    if trajectory is None:
        return [Sample(adapter.name, 0, adapter.modules, is_final=True)]
    *before, (last, _) = checkpoints_of(adapter, trajectory)
    made = [Sample(adapter.name, step, modules) for step, modules in before]
    return [*made, Sample(adapter.name, last, adapter.modules, is_final=True)]


@dataclass(frozen=True)
class FusionTable:
    """All checkpoints as vectors, in memory.

    Attributes:
        tasks: Task of each row.
        steps: Training step of each row.
        x: `(rows, D)`, column `l`.
        v: `(rows, d_v)`.
        is_final: Rows of finished adapters.
    """

    tasks: tuple[str, ...]
    steps: tuple[int, ...]
    x: Float[Tensor, "rows D"]
    v: Float[Tensor, "rows d_v"]
    is_final: tuple[bool, ...]

    @classmethod
    def of(
        cls, layout: Layout, samples: Sequence[Sample], vectors: Mapping[str, Tensor]
    ) -> "FusionTable":
        """Encode samples; rows are in the order of tasks and steps.

        Args:
            layout: Usually fitted on these very samples.
            samples: Checkpoints and a final of every task.
            vectors: `(d_v,)` task vector by task.

        Raises:
            InputError: a task has no task vector.
        """
        missing = sorted({sample.task for sample in samples} - set(vectors))
        if missing:
            raise InputError(
                f"task vectors: none of {', '.join(missing)}. Gather them with jobs.evidence."
            )
        ordered = sorted(samples, key=lambda sample: (sample.task, sample.step))
        finals = {sample.task: sample.modules for sample in ordered if sample.is_final}
        rows = [layout.encode(s.modules, None if s.is_final else finals[s.task]) for s in ordered]
        return cls(
            tuple(s.task for s in ordered),
            tuple(s.step for s in ordered),
            torch.stack(rows),
            torch.stack([vectors[s.task].float() for s in ordered]),
            tuple(s.is_final for s in ordered),
        )

    def rows_of(self, task: str) -> list[int]:
        """Return a task's rows."""
        return [row for row, name in enumerate(self.tasks) if name == task]

    def final_of(self, task: str) -> int:
        """Return the row of a task's finished adapter."""
        return next(row for row in self.rows_of(task) if self.is_final[row])

    @property
    def names(self) -> tuple[str, ...]:
        """All tasks, sorted."""
        return tuple(sorted(set(self.tasks)))

    def to_arrow(self) -> pa.Table:
        """Return the Arrow table."""
        split = [FINAL if final else BEFORE for final in self.is_final]
        columns = {
            "task": pa.array(self.tasks),
            "step": pa.array(self.steps, pa.int64()),
            "l": _lists(self.x),
            "v": _lists(self.v),
            "split": pa.array(split),
        }
        return pa.table(columns)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "FusionTable":
        """Return the rows of an Arrow table, sorted by task and step.

        Raises:
            InputError: a column is missing.
        """
        missing = {"task", "step", "l", "v", "split"} - set(table.column_names)
        if missing:
            raise InputError(
                f"fusion table: no column {', '.join(sorted(missing))}. Make it with FusionTable."
            )
        table = table.sort_by([("task", "ascending"), ("step", "ascending")])
        return cls(
            tuple(table["task"].to_pylist()),
            tuple(table["step"].to_pylist()),
            _matrix(table, "l"),
            _matrix(table, "v"),
            tuple(split == FINAL for split in table["split"].to_pylist()),
        )


def write_table(table: FusionTable, path: Path) -> None:
    """Write a table as one Parquet file."""
    pq.write_table(table.to_arrow(), path, compression="zstd")


def read_table(path: Path) -> FusionTable:
    """Read a table back."""
    return FusionTable.from_arrow(pq.read_table(path))


def _lists(rows: Tensor) -> pa.Array:
    flat = pa.array(rows.numpy().ravel(), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def _matrix(table: pa.Table, column: str) -> Tensor:
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    flat = np.concatenate([np.zeros(0, np.float32), *chunks]).astype(np.float32)
    return torch.from_numpy(flat.reshape(table.num_rows, -1))
