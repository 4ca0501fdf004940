"""Our matcher gives PEFT's answer, in bounded time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.adapters.gaps import covered, find_gaps, most_siblings, unused
from icm_ray.adapters.patterns import (
    MAX_MATCH_STEPS,
    MAX_WAYS,
    match_all,
    may_run_for_ever,
    unsafe_pattern,
)

MODULES = [
    "layers.0.q",
    "layers.1.q",
    "layers.10.q",
    "model.layers.1.q",
    "model.layers.1.attn.q_proj",
    "model.layers.1.attn.v_proj",
    "layersX1.q",
    "a-b.layers.1Xq",
]
SAFE = [
    "q",
    "layers.1.q",
    r"layers\.1\.q",
    r"^layers\.1\.q",
    "^model.layers.1.attn.q_proj",
    r".*\.q_proj",
    r".*(q|v)_proj",
    r"layers\.[0-9]+\.q",
    r"layers\.\d{1,2}\.q",
    "(q_proj|v_proj)",
    r"model\..*attn.*proj",
    "q_proj$",
    "^layers.1.q$",
    ".q",
    "..q",
    r"layers.1\.q",
    "a-b.layers",
    "layers.1.q|v_proj",
    ".?.?q",
    r"layers\.\d{0,2}.q",
    "(q|q_proj|v)",
    "nothing",
]
UNSAFE = [
    "([a-z0-9_.]+)+!",
    "(a+)+$",
    "(a|a)*b",
    "(.*)*x",
    r"(\w+)\1",
    "(?=a)b",
    ".*.*.*.*",
    ".?" * 40 + "zz",
    ".{0,9}" * 8,
    r"\d{1,}" * 4,
    "(a|ab|abc)" * 20,
    "a|b" * 160 + ".*.*.*",
    "a{2,100000}",
    "x" * 501,
    "(",
    "",
]


@given(st.lists(st.sampled_from(SAFE), unique=True))
def test_first_match_wins_as_in_peft(keys):
    from peft.utils.other import get_pattern_key

    table = {key: 100 + number for number, key in enumerate(keys)}
    assert all(unsafe_pattern(key) is None for key in keys)
    found, _ = match_all(table, MODULES, 7)
    assert found == {m: table.get(get_pattern_key(list(table), m), 7) for m in MODULES}


@pytest.mark.parametrize("key", UNSAFE)
def test_unsafe_keys_are_known_without_running_them(key):
    assert unsafe_pattern(key)


@given(st.text("ab.", min_size=1, max_size=6), st.text("ab.", min_size=1, max_size=8))
def test_a_name_with_dots_matches_what_it_matches_in_peft(key, module):
    """Names are looked up; an unescaped dot in one still stands for any character."""
    found, _ = match_all({key: 1}, [module], 0)
    assert found[module] == bool(re.match(rf"(.*\.)?({key})$", module))


@pytest.mark.parametrize("key", [".?" * 16, ".*.*.*", ".{0,9}" * 5 + "(q|v)", "[0-9]*" * 3])
def test_what_may_run_is_tried_in_few_ways(key):
    """The slowest key that passes, on the path that suits it best."""
    assert unsafe_pattern(key) is None
    started = time.perf_counter()
    assert not re.fullmatch(f"{key}!", "0" * 100)
    assert time.perf_counter() - started < MAX_WAYS * 200e-9


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("keys", "modules"),
    [
        ([f".*.*.*x{i}" for i in range(9)], [f"{'deep.' * 12}l.{i}.q" for i in range(999)]),
        ([f"a{i}|b" for i in range(1000)], [f"l.{i}.q" for i in range(40_000)]),
        ([f"{'.' * i}a{'.' * (97 - i)}" for i in range(97)], ["a" * 98] * 20_000),
    ],
)
def test_too_many_tries_are_refused_before_the_first(keys, modules):
    with pytest.raises(ValueError, match=f"regular expressions for {len(modules)} modules"):
        match_all(dict.fromkeys(keys, 1), modules, 0)
    assert MAX_MATCH_STEPS > 1e8


@pytest.mark.timeout(30)
def test_a_name_for_every_module_is_looked_up_in_linear_time():
    modules = [f"model.layers.{i % 60}.mlp.experts.{i}.up" for i in range(5_000)]
    ranks = {module: 1 + number % 7 for number, module in enumerate(modules)}
    assert match_all(ranks, modules, 99) == (ranks, [])
    names = frozenset([*modules[::2], *(f"x{i}" for i in range(100_000))])
    assert [covered(module, names) for module in modules] == [True, False] * 2_500
    assert len(unused(names, modules)) == 100_000


def test_a_name_selects_what_ends_in_it_after_a_dot():
    for module in ("q", "a.q", "a.b.q"):
        assert covered(module, ["q"])
    assert covered("a.b.q", ["b.q"])
    assert not covered("a.bq", ["q"])
    assert unused(["b.q", "v", "q", "a"], ["a.b.q"]) == ["v", "a"]


def test_siblings_are_counted_where_they_are_most():
    assert most_siblings([]) == 0
    assert most_siblings(["a.x", "b.x", "c", "a-b"]) == 4
    assert most_siblings(["a.b", "a.c", "a.b.d"]) == 2
    assert most_siblings([f"l.{i}.{leaf}" for i in range(100) for leaf in "qv"]) == 100


def test_contradictions_are_reported():
    _, torn = match_all({"q": 4, r"layers\.1\.q": 8, ".*v_proj": 4}, MODULES, 7)
    assert torn == ["layers.1.q", "model.layers.1.q"]


def test_targets_that_people_write_are_harmless():
    unsloth = r"(?:.*?(?:language).*?(?:self_attn|mlp).*?(?:q_proj|v_proj)).*?"
    assert not may_run_for_ever(unsloth)
    assert not may_run_for_ever(r".*\.(q_proj|v_proj)")
    assert may_run_for_ever("([a-z0-9_.]+)+!")
    assert may_run_for_ever(".?" * 40 + "zz")
    assert may_run_for_ever(".{0,9}" * 12)
    assert not may_run_for_ever(r".*layers\.(1|2|3)\..*(attn|mlp).*_proj")


def layers(count, leaves="qv"):
    return [f"layers.{i}.attn.{leaf}" for i in range(count) for leaf in leaves]


def test_whole_adapters_have_no_gaps():
    mixture = [f"layers.{i}.mlp.experts.{e}.up" for i in range(1, 4) for e in range(3)]
    dense = ["layers.0.mlp.up", "layers.0.mlp.down"]
    hybrid = [f"layers.{i}.attn.q" for i in range(3, 24, 4)]
    for modules in (layers(4), layers(1), mixture + dense, hybrid, ["head", "embed"]):
        assert find_gaps(modules) == ([], [])


def test_one_broken_layer_is_wrong_and_many_are_only_uneven():
    wrong, _ = find_gaps(set(layers(4)) - {"layers.2.attn.q"})
    assert wrong == ["layers.2.attn: no q but all other layers have it"]
    wrong, _ = find_gaps([*layers(4), "layers.7.attn.q", "layers.7.attn.v"])
    assert wrong == ["layers.7.attn: follows layer 3 but the next number is expected"]
    wrong, uneven = find_gaps(set(layers(8)) - {"layers.2.attn.q", "layers.4.attn.q"})
    assert not wrong
    assert uneven == ["layers.*.attn: 2 of 8 layers have other modules"]
    wrong, uneven = find_gaps([f"layers.{i}.attn.q" for i in (0, 1, 4, 9, 11)])
    assert not wrong
    assert uneven == ["layers.*.attn: the layer numbers have gaps"]
