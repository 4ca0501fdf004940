"""Class: adapters that are fine alone and odd together, and names they cannot have."""

from pathlib import Path

import pytest
import torch
from adapter_samples import plain_tensors
from corpus_cases import (
    Case,
    accepted,
    configured,
    every,
    hold,
    refused,
    third_tensors,
    warned,
    with_tensors,
)


def fine(folder: Path) -> None:
    """Leave the third adapter as it is."""


def scaled(factor: float, tensors: dict[str, torch.Tensor]):
    return with_tensors({n: t * factor if "lora_B" in n else t for n, t in tensors.items()})


def elsewhere(folder: Path) -> None:
    """Adapt modules that no other adapter knows."""
    names = third_tensors()
    moved = {name.replace("layers", "blocks"): tensor for name, tensor in names.items()}
    with_tensors({**dict.fromkeys(names, ...), **moved})(folder)


def some_of_them(folder: Path) -> None:
    configured(target_modules=["q"])(folder)
    with_tensors({name: ... for name in third_tensors() if ".v." in name})(folder)


def named(name: str, word: str = "adapters.1.name: ") -> Case:
    return refused(word, fine, "r.yaml", code=2, adapters={"a": "a", name: "third"})


SETS = {
    "set_two_bases": refused("but one base for all", configured(base_model_name_or_path="other")),
    "set_disjoint": refused("but modules in common are expected", elsewhere),
    "set_some_modules": warned("lacks 4 of 8 modules", some_of_them),
    "set_twins": warned("the same change as a, twice", with_tensors(plain_tensors())),
    "set_one": warned("the only adapter", fine, adapters={"third": "third"}),
    "set_none": refused("adapters: ", fine, "r.yaml", code=2, adapters={}),
    "set_opposites": refused(
        "the inputs cancel out",
        scaled(-1.0, plain_tensors()),
        "merged",
        adapters={"a": "a", "third": "third"},
    ),
    "set_norms_apart": warned("times that of a", scaled(1e6, third_tensors())),
    "set_names_of_one_spelling": refused(
        "the same as 'Third' up to case", fine, adapters={"Third": "third", "third": "b"}
    ),
    "set_other_task_type": warned("task_type: ", configured(task_type="CAUSAL_LM")),
    "ok_revision": accepted(configured(revision="main")),
}
NAMES = {
    "name_escapes": named("../../escape"),
    "name_absolute": named("/abs"),
    "name_empty": named(""),
    "name_dots": named(".."),
    "name_nul": named("a\0b", "holds a NUL"),
    "name_newline": named("a\nb"),
    "name_ansi": named("\x1b[31m"),
    "name_bidi": named("\u202eb"),
    "name_surrogate": named("\ud800", "half a character"),
    "name_300_long": named("x" * 300),
    "name_option": named("-rf"),
    "name_command": named("$(reboot)"),
    "ok_name": accepted(fine, adapters={"a": "a", "Task_2.x-y": "third"}),
}


@pytest.mark.timeout(60)
@every({**SETS, **NAMES})
def test_sets(case, tmp_path):
    hold(case, tmp_path)
