"""Targets: blocks by parsed index, modules by the end of their path."""

import pytest

from icm_ray.adapters.blocks import block_index, block_path
from icm_ray.errors import InputError, RecipeError
from icm_ray.learning.targets import Targets

LLAMA = [f"layers.{i}.self_attn.{m}_proj" for i in range(10) for m in "qkvo"]
VALUES_ONLY = [path for path in LLAMA if path.endswith(("q_proj", "v_proj"))]


@pytest.mark.parametrize(
    ("path", "index", "block"),
    [
        ("layers.24.self_attn.v_proj", 24, "layers.24"),
        ("encoder.layer.3.attention.self.query", 3, "encoder.layer.3"),
        ("model.layers.2.mlp.experts.7.up_proj", 2, "model.layers.2"),
        ("h.0", 0, "h.0"),
        ("0.q", 0, "0"),
        ("embeddings.word_embeddings", None, None),
        ("layer24.q_proj", None, None),
    ],
)
def test_blocks_are_numbers_of_the_path(path: str, index, block) -> None:
    assert (block_index(path), block_path(path)) == (index, block)


def test_the_default_is_the_output_projection_of_the_last_quarter() -> None:
    assert Targets().choose(LLAMA) == tuple(f"layers.{i}.self_attn.o_proj" for i in (7, 8, 9))
    values = tuple(f"layers.{i}.self_attn.v_proj" for i in (7, 8, 9))
    assert Targets().choose(VALUES_ONLY) == values
    names = ("self.key", "output.dense")
    bert = [f"encoder.layer.{i}.attention.{name}" for i in range(6) for name in names]
    assert Targets().choose(bert) == (
        "encoder.layer.4.attention.output.dense",
        "encoder.layer.5.attention.output.dense",
    )
    assert Targets().choose(["layers.0.mlp.up", "layers.0.mlp.down"]) == ("layers.0.mlp.up",)


def test_names_and_blocks_can_be_said() -> None:
    assert Targets(("v_proj",), blocks=(2,)).choose(LLAMA) == ("layers.2.self_attn.v_proj",)
    assert len(Targets("all", share=1e-9).choose(LLAMA)) == 4
    assert len(Targets("all", share=1.0).choose(LLAMA)) == 40
    # A substring test would take blocks 4 and 14 for one another, and wo for two.
    assert Targets(("v_proj",), blocks=(1,)).choose([*LLAMA, "layers.11.self_attn.v_proj"]) == (
        "layers.1.self_attn.v_proj",
    )


def test_nothing_found_is_an_error_with_the_blocks_there_are() -> None:
    with pytest.raises(RecipeError, match=r"names \('x',\) in blocks of the last 0.25.*0, 1, 2"):
        Targets(("x",)).choose(LLAMA)
    with pytest.raises(RecipeError, match=r"blocks \(99,\)"):
        Targets(blocks=(99,)).choose(LLAMA)
    with pytest.raises(RecipeError, match="adapted blocks are none"):
        Targets().choose(["embeddings.word"])


@pytest.mark.parametrize("last", ["v_proj", "o_proj"])
def test_targets_that_no_merge_changes_are_refused(last: str) -> None:
    paths = [f"layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", last)]
    if last == "v_proj":
        with pytest.raises(InputError, match="the loss depends on no coefficient"):
            Targets().refuse_unreached(paths)
    else:
        Targets().refuse_unreached(paths)
    Targets().refuse_unreached([*paths, "layers.1.self_attn.v_proj"])
    Targets().refuse_unreached([*paths, "embed_tokens"])
