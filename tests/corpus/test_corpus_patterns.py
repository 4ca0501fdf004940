"""Class: names and patterns of modules, hostile ones among them, all answered in time."""

import pytest
import torch
from adapter_samples import PREFIX
from corpus_cases import (
    accepted,
    configured,
    every,
    hold,
    key,
    tensors,
    third_tensors,
    told,
    with_tensors,
)

REDOS = "([a-z0-9_.]+)+!"


def of_ranks(ranks: dict[str, int], **keys: object):
    """Return what gives some modules another rank than 2, as the config says."""

    def spoil(folder):
        configured(**keys)(folder)
        draw = torch.Generator().manual_seed(5)
        changes = {
            f"{PREFIX}{module}.lora_{side}.weight": torch.randn(shape, generator=draw)
            for module, rank in ranks.items()
            for side, shape in (("A", (rank, 5)), ("B", (6, rank)))
        }
        assert changes.keys() <= third_tensors().keys()
        with_tensors(changes)(folder)

    return spoil


CASES = {
    "cfg_redos_rank_pattern": key("could run for ever", rank_pattern={REDOS: 4}),
    "cfg_redos_alpha_pattern": key("could run for ever", alpha_pattern={REDOS: 4}),
    "cfg_redos_optional": key("could run for ever", rank_pattern={".?" * 40 + "zz": 4}),
    "cfg_redos_counted": key("could run for ever", alpha_pattern={".{0,9}" * 12: 4}),
    "cfg_redos_wildcards": key("could run for ever", alpha_pattern={".*a.*b.*c.*d!": 4}),
    "cfg_redos_target_modules": told("could match for ever", target_modules=REDOS),
    "cfg_redos_exclude_modules": told("could match for ever", exclude_modules=REDOS),
    "cfg_long_pattern": key("501 characters long", alpha_pattern={"q" * 501: 4}),
    "cfg_bad_regex": key("no valid regular expression", rank_pattern={"*q": 2}),
    "cfg_bad_target_regex": key("but a valid regular expression", target_modules="*q"),
    "cfg_bad_exclude_regex": key("but a valid regular expression", exclude_modules="(q"),
    "cfg_bad_layers_regex": key("but a valid regular expression", layers_pattern="(q"),
    "cfg_target_number": key("target_modules: 3 but a list of names", target_modules=3),
    "cfg_target_mixed": key("but a list of names or text", target_modules=["q", 3]),
    "cfg_target_uncovered": tensors("layers.0.v: not in target_modules", target_modules=["q"]),
    "cfg_target_idle": told('"k_proj" has no tensors', target_modules=["q", "v", "k_proj"]),
    "cfg_rank_pattern_list": key('rank_pattern: ["q"] but a table', rank_pattern=["q"]),
    "cfg_rank_pattern_text": key("a table of positive integers", rank_pattern={"q": "4"}),
    "cfg_rank_pattern_rank": tensors("layers.1.q: rank 2 but", rank_pattern={"layers.1.q": 4}),
    "cfg_alpha_pattern_null": key("a table of finite numbers", alpha_pattern={"q": None}),
    "cfg_layers_and_regex": key(
        "PEFT refuses it beside a pattern", target_modules=".*", layers_to_transform=[1]
    ),
    "cfg_layers_pattern_alone": key("without them. Leave both out", layers_pattern="layers"),
    "ok_regex_target": accepted(configured(target_modules=r".*\.(q|v)")),
    "ok_null_patterns": accepted(configured(rank_pattern=None, alpha_pattern=None)),
    "ok_rank_pattern": accepted(of_ranks({"layers.1.q": 4}, rank_pattern={"layers.1.q": 4})),
    "ok_rank_above_width": accepted(of_ranks({"layers.2.q": 16}, rank_pattern={"layers.2.q": 16})),
    "ok_alpha_pattern": accepted(configured(alpha_pattern={r"layers\.[0-9]\.v": 3})),
    "ok_pattern_of_nothing": accepted(configured(rank_pattern={"^layers.0.k_proj": 16})),
}


@pytest.mark.timeout(30)
@every(CASES)
def test_patterns(case, tmp_path):
    hold(case, tmp_path)
