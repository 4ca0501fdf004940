import math

import pytest

from icm_ray.report.text import MISSING, clip, markdown, number, percent, plain, short_modules


def test_numbers_and_what_is_none():
    assert (number(0.7126), percent(0.7126)) == ("0.713", "71.3 %")
    assert number(-0.0001) == "0.000"
    assert {number(None), number(math.nan), percent(math.inf)} == {MISSING}


def test_hidden_characters_are_shown():
    assert plain("a\x1b[31m\u202eb\u2028") == "a\\x1b[31m\\x202eb\\x2028"
    assert clip("abcdefghijkl", 7) == "abc…jkl"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a|b", r"a\|b"), ("<b>&", "&lt;b&gt;&amp;"), ("x_y`z`", r"x\_y\`z\`"), ("a\nb", "a b")],
)
def test_markdown_is_literal(name, shown):
    assert markdown(name) == shown


def test_modules_are_short_unique_and_in_layer_order():
    stem = "encoder.layer"
    paths = [f"{stem}.10.attention.query", f"{stem}.2.attention.query"]
    paths += [f"{stem}.2.output.dense", f"{stem}.2.attention.output.dense", "head"]

    assert list(short_modules(paths).values()) == [
        "2.attention.output.dense",
        "2.query",
        "2.output.dense",
        "10.query",
        "head",
    ]
