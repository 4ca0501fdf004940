"""What `icm-ray inspect` shows of adapters on a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from icm_ray.errors import one_line

if TYPE_CHECKING:
    from rich.table import Table


def adapter_table(adapters: Sequence[dict[str, Any]]) -> "Table":
    """Return one line for each adapter, from its facts by name."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="adapters")
    rows = [_cells(facts) for facts in adapters]
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for cells in rows:
        table.add_row(*(escape(one_line(str(cell))) for cell in cells.values()))
    return table


def _cells(row: dict[str, Any]) -> dict[str, object]:
    """Return one adapter's line by heading."""
    return {
        "adapter": row["name"],
        "format": row["format"],
        "base": row["base_model"],
        "modules": f"{row['modules']}{_of_them(row['fused_experts'])}",
        "rank": _span(row["ranks"]),
        "scaling": _span(row["scalings"]),
        "dtype": row["dtype"],
        "MB": f"{row['bytes'] / 1e6:.2f}",
        "norm": f"{row['norm']:.4g}",
    }


def _of_them(experts: int) -> str:
    return f", {experts} of them experts" if experts else ""


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
