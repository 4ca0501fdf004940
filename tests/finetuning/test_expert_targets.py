"""Where adapters are trained: what a recipe names, or what PEFT knows of the model's type."""

from pathlib import Path

import pytest
import torch

from icm_ray.config import LoRARecipe
from icm_ray.errors import RecipeError
from icm_ray.finetuning.targets import with_targets


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    """A folder with a random DINOv2, whose type PEFT has no targets for."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    return tmp_path


def test_left_out_they_are_peft_s_own(tiny_bert: Path, tiny_llama: Path) -> None:
    assert with_targets(LoRARecipe(rank=3), tiny_bert) == LoRARecipe(
        rank=3, targets=["query", "value"]
    )
    assert with_targets(LoRARecipe(), tiny_llama).targets == ["q_proj", "v_proj"]


def test_a_type_without_any_is_told_what_there_is(dino: Path) -> None:
    with pytest.raises(RecipeError, match=r"none of its own for a dinov2\..*fc1, .*q_proj"):
        with_targets(LoRARecipe(), dino)


@pytest.mark.parametrize("targets", [["key", "output.dense"], r".*\.query", "all-linear"])
def test_named_ones_stay_as_they_are(tiny_bert: Path, targets: list[str] | str) -> None:
    asked = LoRARecipe(targets=targets)
    assert with_targets(asked, tiny_bert, shared=True) == asked


def test_every_name_that_is_no_module_is_said(tiny_bert: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        with_targets(LoRARecipe(targets=["query", "kye", "q_proj"]), tiny_bert)
    said = caught.value.problems
    assert len(said) == 2
    assert "'kye' is no module of the base. Did you mean 'key'?" in said[0]
    assert "'q_proj'" in said[1]


@pytest.mark.parametrize("targets", [["LayerNorm"], r".*\.nothing"])
def test_what_peft_cannot_adapt_is_refused(tiny_bert: Path, targets: list[str] | str) -> None:
    with pytest.raises(RecipeError, match=r"^lora\.targets: .*Name linear layers"):
        with_targets(LoRARecipe(targets=targets), tiny_bert)


def test_only_linear_layers_share_a_pass(tiny_bert: Path) -> None:
    asked = LoRARecipe(targets=["query", "word_embeddings"])
    assert with_targets(asked, tiny_bert) == asked
    with pytest.raises(RecipeError, match=r"word_embeddings is no linear layer.*Set it to 1"):
        with_targets(asked, tiny_bert, shared=True)
