"""The merge methods as people read them: a list by family, and one method in full."""

import io

import pytest
from rich.console import Console

from icm_ray.methods import METHODS
from icm_ray.report.method_table import described, method_list, method_page, paragraphs


@pytest.mark.parametrize("width", [80, 160])
def test_the_list_of_methods_fits_the_terminal(width):
    schemas = {name: row.schema() for name, row in METHODS.items()}
    families = {name: "subspaces" if name == "svd" else "sums" for name in METHODS}
    console = Console(width=width, file=io.StringIO())
    console.print(method_list(schemas, families, width))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    first_words = [line.split()[0] for line in lines if line.strip() and line[0] != " "]
    for name, row in METHODS.items():
        assert name in first_words
        text = " ".join(" ".join(lines).split())
        assert row.use.split()[0] in text
    assert text.index("averages and sums") < text.index("by singular vectors")
    assert "`" not in text


def test_families_come_in_a_fixed_order_and_unknown_ones_last():
    schemas = {name: METHODS["soup"].schema() for name in "abc"}
    families = {"a": "brand new", "b": "learned", "c": "sums"}
    console = Console(width=80, file=io.StringIO())
    console.print(method_list(schemas, families, 80))
    text = console.file.getvalue()
    places = [
        text.index(family) for family in ("averages and sums", "learned from data", "brand new")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number in (0, 1]"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "number in [0, 1)"),
        ({"type": "integer", "minimum": 1}, "whole number >= 1"),
        ({"type": "number", "exclusiveMinimum": 0.5}, "number > 0.5"),
        ({"type": "number", "maximum": 2}, "number <= 2"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "whole number or none"),
        ({"type": "array", "items": {"type": "string"}}, "list of texts"),
        ({"enum": ["mean", "sum"], "type": "string"}, "mean | sum"),
        ({"const": "mean"}, "mean"),
        ({"type": "boolean"}, "true | false"),
        ({"type": "object"}, "table"),
    ],
)
def test_types_and_ranges_described(schema, words):
    assert described(schema) == words


def test_paragraphs_are_filled_and_tables_stay():
    text = "One\nline.\n\nPaper: x\n  y.\nDiffers: z,\nmore.\n\n    a   b\n    c   d\n"
    assert paragraphs(text) == [
        "One line.",
        "Paper: x\n  y.\nDiffers: z, more.",
        "    a   b\n    c   d",
    ]


def test_a_page_wraps_the_tables_of_its_docstring():
    schema = {**METHODS["soup"].schema(), "presets": {"wild": {"density": 0.9, "sign": None}}}
    table = "    name    " + "what it does " * 8 + "\n    other   " + "something else " * 8
    console = Console(width=80, file=io.StringIO())
    console.print(method_page("soup", schema, "sums", f"One.\n\n{table}\n\nEnd."))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    start = next(line for line in lines if line.startswith("  other "))
    assert lines[lines.index(start) + 1].startswith(" " * start.index("something"))
    assert "density: 0.9, sign: none" in "\n".join(lines)
