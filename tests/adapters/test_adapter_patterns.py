"""Our matcher gives PEFT's answer, in bounded time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.adapters.gaps import find_gaps
from icm_ray.adapters.patterns import match_all, may_run_for_ever, unsafe_pattern

MODULES = [
    "layers.0.q",
    "layers.1.q",
    "layers.10.q",
    "model.layers.1.q",
    "model.layers.1.attn.q_proj",
    "model.layers.1.attn.v_proj",
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
    "layers.1.q|v_proj",
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


def test_contradictions_are_reported():
    _, torn = match_all({"q": 4, r"layers\.1\.q": 8, ".*v_proj": 4}, MODULES, 7)
    assert torn == ["layers.1.q", "model.layers.1.q"]


def test_targets_that_people_write_are_harmless():
    unsloth = r"(?:.*?(?:language).*?(?:self_attn|mlp).*?(?:q_proj|v_proj)).*?"
    assert not may_run_for_ever(unsloth)
    assert not may_run_for_ever(r".*\.(q_proj|v_proj)")
    assert may_run_for_ever("([a-z0-9_.]+)+!")


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
