"""Class: tensors that are missing, too many, of wrong shapes, or of names that are none."""

import pytest
import torch
from adapter_samples import PREFIX
from corpus_cases import A0, B0, WEIGHTS, every, hold, refused, third_tensors, warned, with_tensors


def wrong(word: str, **changes: object):
    return refused(word, with_tensors(changes), WEIGHTS)


def key(name: str, side: str = "A") -> str:
    return f"{PREFIX}{name}.lora_{side}.weight"


def pair(name: str) -> dict[str, torch.Tensor]:
    return {key(name, "A"): torch.ones(2, 5), key(name, "B"): torch.ones(6, 2)}


CASES = {
    "zero_size": wrong("shape [2, 0] but 2 to 5 dimensions", **{A0: torch.ones(2, 0)}),
    "scalar": wrong("shape [] but 2 to 5 dimensions", **{A0: torch.tensor(1.0)}),
    "vector": wrong("shape [2] but 2 to 5 dimensions", **{A0: torch.ones(2)}),
    "three_dimensions": wrong("A [2, 5, 1] and B [6, 2] but", **{A0: torch.ones(2, 5, 1)}),
    "rank_mismatch": wrong("A of rank 3 and B of rank 2", **{A0: torch.ones(3, 5)}),
    "transposed": wrong("A of rank 5 and B of rank 2", **{A0: torch.ones(5, 2)}),
    "too_wide": wrong(
        "but at most 16777216 rows and columns",
        **{A0: torch.ones(2, 2**24 + 1, dtype=torch.bfloat16)},
    ),
    "wrong_hidden": refused(
        "layers.0.q: 6 x 7 but 6 x 5 as in a", with_tensors({A0: torch.ones(2, 7)})
    ),
    "missing_A": wrong(f"{A0}: missing but its partner needs it", **{A0: ...}),
    "missing_B": wrong(f"{B0}: missing but its partner needs it", **{B0: ...}),
    "missing_module": wrong("layers.0: no q but all other layers have it", **{A0: ..., B0: ...}),
    "no_tensors": wrong("0 tensors", **dict.fromkeys(third_tensors(), ...)),
    "no_lora_keys": wrong(
        "x: unknown but only", x=torch.ones(2), **dict.fromkeys(third_tensors(), ...)
    ),
    "layer_7_of_4": wrong(
        "layers.7: follows layer 3 but the next number is expected",
        **{name.replace("layers.0", "layers.7"): t for name, t in third_tensors().items()},
    ),
    "no_prefix": wrong(
        "names that begin with base_model.model.",
        **dict.fromkeys(third_tensors(), ...),
        **{name.removeprefix(PREFIX): tensor for name, tensor in third_tensors().items()},
    ),
    "dora_undeclared": wrong(
        "DoRA is no B A", **{f"{PREFIX}layers.0.q.lora_magnitude_vector": torch.ones(6)}
    ),
    "extra_key": wrong("something: unknown but only", something=torch.ones(2)),
    "adapter_name_in_key": wrong(
        "Take the adapter's name out of the key",
        **{f"{PREFIX}layers.0.q.lora_A.default.weight": torch.ones(2, 5)},
    ),
    "saved_embedding": wrong("a whole layer", **{f"{PREFIX}embed_tokens.weight": torch.ones(4, 4)}),
    "path_key": wrong("no module path", **pair("../../etc")),
    "absolute_key": wrong("no module path", **pair("/etc/passwd")),
    "ansi_key": wrong("no module path", **pair("\x1b[31mq")),
    "bidi_key": wrong("no module path", **pair("\u202eq")),
    "newline_key": wrong("no module path", **pair("q\nerror: all is well")),
    "two_kinds": wrong(
        "both linear and embedding factors",
        **{
            f"{PREFIX}layers.0.q.lora_embedding_A": torch.ones(2, 5),
            f"{PREFIX}layers.0.q.lora_embedding_B": torch.ones(6, 2),
        },
    ),
    "base_copy": warned(
        "a copy of the base weights",
        with_tensors({f"{PREFIX}layers.1.q.base_layer.weight": torch.zeros(6, 5)}),
        WEIGHTS,
    ),
}


@pytest.mark.timeout(60)
@every(CASES)
def test_tensors(case, tmp_path):
    hold(case, tmp_path)
