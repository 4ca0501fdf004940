"""Random two-layer models, small enough for every test."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.5,
}


def save_bert(folder: Path, **config: Any) -> None:
    """Save a random BERT without a tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BertModel(BertConfig(**SIZES, **config)).save_pretrained(folder)


def save_llama(folder: Path, **config: Any) -> None:
    """Save a random Llama without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    more = {"num_key_value_heads": 1, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**SIZES, **more, **config)).save_pretrained(folder)


IMAGE = "<image>"
IN_PARTS = (
    "{% for turn in messages %}[CLS] {% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %} {% endfor %}[SEP] "
    "{% endfor %}{% if add_generation_prompt %}[CLS] {% endif %}"
)
"""A chat template as vision-language models have them: contents are lists of parts."""


def save_llava(folder: Path, tokenizer: Any, **config: Any) -> None:
    """Save a random LLaVA that reads 28 x 28 pixels as 4 tokens, with its processor."""
    from transformers import (
        Dinov2Config,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tower = Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        mlp_ratio=2, initializer_range=0.5,
    )  # fmt: skip
    words = LlamaConfig(
        **SIZES,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        vocab_size=len(tokenizer),
        **config,
    )
    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.to_dict(),
            text_config=words.to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=IN_PARTS,
    ).save_pretrained(folder)


def save_packed(base: Path, folder: Path, bits: int) -> None:
    """Save a base as bitsandbytes packs it into 4 or 8 bits."""
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    shutil.copytree(base, folder)
    _own_model(base, quantization_config=how).save_pretrained(folder)


def save_unpacked(base: Path, packed: Path, folder: Path) -> None:
    """Save a base with the numbers that stand in a packed one."""
    shutil.copytree(base, folder)
    numbers = _own_model(packed).dequantize().state_dict()
    weights = {name: numbers[name].contiguous() for name in load_file(base / WEIGHTS)}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _own_model(folder: Path, **options: Any) -> Any:
    from icm_ray.adapters.base_folder import open_base
    from icm_ray.adapters.base_skeleton import own_class

    kind = own_class(open_base(folder).config)
    return kind.from_pretrained(folder, device_map={"": "cpu"}, **options)
