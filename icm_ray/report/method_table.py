"""The merge methods for people: a list of all, and one method in full, as wide as the terminal."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from icm_ray.report.text import plain

Schema = Mapping[str, Any]
"""A row of `icm-ray methods --json`."""

FAMILIES = {
    "sums": "averages and sums",
    "signs and sparsity": "signs and sparsity: entry by entry",
    "subspaces": "subspaces: by singular vectors",
    "factors": "factor-wise: A and B themselves",
    "learned": "learned from data",
}
"""Headings of the list in its order; any other family comes after these."""
WIDE = 120
"""Columns from which on every fact has a column of its own."""
PROPERTIES = {
    "identity": "one adapter alone does not give itself back",
    "homogeneity": "inputs c times as large do not give a result c times as large",
    "scaling": "how a delta is split into B and A changes the result",
}
"""What it means that a method is exempt from a property all others have."""


def method_list(
    schemas: Mapping[str, Schema], families: Mapping[str, str], width: int
) -> RenderableType:
    """Return all methods by family: what each does, when to use it, needs, cost and paper.

    Args:
        schemas: Every row by name; parameters are not looked at.
        families: Family of every row.
        width: Columns of the terminal; a table from `WIDE` on, short paragraphs below.
    """
    rows = _wide(schemas, families) if width >= WIDE else _narrow(schemas, families)
    closing = "R is the sum of ranks. One method in full: icm-ray methods NAME"
    return Group(rows, Text(closing, style="dim"))


def method_page(name: str, schema: Schema, family: str, docstring: str) -> RenderableType:
    """Return everything about one method.

    Args:
        name: The method's name.
        schema: Its row.
        family: Its family.
        docstring: Of its function, indentation removed; the first line is the row's summary.
    """
    head = Text.assemble((name, "bold"), ("  " + FAMILIES.get(family, family), "dim"))
    parts: list[RenderableType] = [head, Text(_prose(schema["summary"]))]
    facts = {
        "formula": schema["formula"],
        "use it": schema["use"],
        "needs": schema["evidence"] or "nothing but adapters",
        "rank": _default_rank(schema["default_rank"]),
        "cost": f"{schema['cost']}; R is the sum of ranks",
        "paper": schema["paper"],
    }
    parts += ["", _pairs(facts.items())]
    parts += _section("Parameters", _parameters(schema["parameters"]))
    # Those that only name themselves stand beside their parameter already.
    if presets := {n: v for n, v in schema["presets"].items() if v != {"preset": n}}:
        parts += _section("Presets", _pairs((n, _settings(v)) for n, v in presets.items()))
    parts += _section("Steps around it, as around any method", _parameters(schema["steps"]))
    if schema["tensors"]:
        parts += _section("Evidence it can be given", _pairs(schema["tensors"].items()))
    if schema["exempt"]:
        parts += _section("Unlike other methods", _exemptions(schema["exempt"]))
    if rest := paragraphs(docstring.partition("\n")[2]):
        parts += _section("In full", Group(*(part for one in rest for part in (_block(one), ""))))
    return Group(*parts)


def described(schema: Schema) -> str:
    """Return a parameter's type and range in words: "number in (0, 1]", "mean | sum"."""
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(described, schema["anyOf"])))
    kind = str(schema.get("type", "value"))
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"one {described(values)} per task" if isinstance(values, Mapping) else "table"
    if kind == "array":
        item = described(schema.get("items", {}))
        return f"list, each {item}" if " " in item else f"list of {item}s"
    words = {"null": "none", "boolean": "true | false", "string": "text", "integer": "whole number"}
    return words.get(kind, kind) + _range(schema)


def paragraphs(docstring: str) -> list[str]:
    """Return the paragraphs of a docstring, each refilled; headings, lists and indents stay."""
    found = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines: list[str] = []
        for line in block.splitlines():
            starts_anew = line[:1].isspace() or re.match(r"[-*] |[A-Z]\w*:|Args|Returns", line)
            if lines and not starts_anew:
                lines[-1] += " " + line.strip()
            else:
                lines.append(line.rstrip())
        found.append(_prose("\n".join(lines)))
    return [block for block in found if block.strip()]


def _grouped(names: Iterable[str], families: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(families[name], []).append(name)
    order = [*FAMILIES, *(family for family in groups if family not in FAMILIES)]
    return {FAMILIES.get(key, key): groups[key] for key in order if key in groups}


def _wide(schemas: Mapping[str, Schema], families: Mapping[str, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
    # Names must stay whole; the other columns share what is left in these parts.
    table.add_column("method", no_wrap=True)
    for heading, ratio in (("what it does", 9), ("when to use it", 8)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    table.add_column("needs", no_wrap=True)
    for heading, ratio in (("cost", 5), ("paper", 7)):
        table.add_column(heading, ratio=ratio, overflow="fold", style="dim")
    for family, names in _grouped(schemas, families).items():
        table.add_row()
        title, _, gloss = family.partition(": ")  # the gloss would widen the column of names
        table.add_row(Text(title, style="bold"), Text(gloss, style="dim"))
        for name in names:
            row = schemas[name]
            needs = row["evidence"] or "-"
            texts = (_prose(row["summary"]), row["use"], needs, row["cost"], row["paper"])
            table.add_row(Text(name, style="cyan"), *map(Text, map(plain, texts)))
    table.add_row()
    return table


def _narrow(schemas: Mapping[str, Schema], families: Mapping[str, str]) -> Group:
    parts: list[RenderableType] = []
    width = max(map(len, schemas), default=0)
    for family, names in _grouped(schemas, families).items():
        parts += [Text(family, style="bold"), ""]
        for name in names:
            row = schemas[name]
            needs = [f"needs {row['evidence']}"] if row["evidence"] else []
            facts = " · ".join([*needs, row["cost"], row["paper"]])
            text = Text(plain(_prose(row["summary"])))
            text.append("\n" + plain(row["use"]), style="italic")
            text.append("\n" + plain(facts), style="dim")
            parts += [_grid([(Text(name, style="cyan"), text)], width), ""]
    return Group(*parts)


def _parameters(parameters: Mapping[str, Schema]) -> RenderableType:
    if not parameters:
        return Text("none")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True, style="cyan")
    table.add_column("type and range", overflow="fold", min_width=16)
    table.add_column("default", overflow="fold")
    table.add_column("meaning", overflow="fold", ratio=1)
    for name, schema in parameters.items():
        texts = (name, described(schema), _value(schema.get("default")), schema["description"])
        table.add_row(*map(Text, map(plain, texts)))
    return table


def _exemptions(exempt: Mapping[str, str]) -> Table:
    return _pairs((name, f"{PROPERTIES.get(name, name)}: {why}") for name, why in exempt.items())


def _section(title: str, body: RenderableType) -> list[RenderableType]:
    return ["", Text(title, style="bold"), Padding(body, (0, 0, 0, 2))]


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    rows = [(Text(plain(name), style="cyan"), Text(_prose(text))) for name, text in pairs]
    return _grid(rows, max((name.cell_len for name, _ in rows), default=0))


def _grid(rows: Sequence[tuple[Text, Text]], width: int) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, min_width=width)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _block(paragraph: str) -> RenderableType:
    """Return a paragraph as text, and one that is laid out in columns as a table that can wrap."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in paragraph.splitlines()]
    is_table = paragraph[:1].isspace() and len({len(row) for row in rows} | {1}) == 2
    if not is_table:
        return Text(paragraph)
    grid = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _default_rank(rank: str) -> str:
    if rank == "exact":
        return "exact unless output.rank says otherwise"
    return f"that of the {rank} unless output.rank says otherwise"


def _range(schema: Schema) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    lower = f"({above:g}" if above is not None else f"[{low:g}" if low is not None else None
    upper = f"{below:g})" if below is not None else f"{high:g}]" if high is not None else None
    if lower and upper:
        return f" in {lower}, {upper}"
    if lower:
        return f" {'>' if above is not None else '>='} {lower[1:]}"
    return f" {'<' if below is not None else '<='} {upper[:-1]}" if upper else ""


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    return "none" if value is None else str(value).lower() if value in (True, False) else str(value)


def _prose(text: str) -> str:
    return plain(text).replace("`", "")
