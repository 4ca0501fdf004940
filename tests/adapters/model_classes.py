"""Tiny models of transformers' real classes, with adapters that PEFT trained on them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IMAGE_TOKEN = 30
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PICTURE = {**TOWER, "image_size": 8, "patch_size": 4}
TEXT = {**TOWER, "vocab_size": 32, "max_position_embeddings": 40}
BART = {
    **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (
        ("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))},
    **{"d_model": 16, "vocab_size": 32, "max_position_embeddings": 40},
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llava() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**PICTURE),
        text_config=LlamaConfig(**TEXT, **TOKENS),
        image_token_index=IMAGE_TOKEN,
    )
    return LlavaForConditionalGeneration(config)


def florence2() -> Any:
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

    vision = Florence2VisionConfig(
        depths=(1, 1),
        patch_size=(7, 3),
        patch_stride=(4, 2),
        patch_padding=(3, 1),
        patch_prenorm=(False, True),
        embed_dim=(8, 16),
        num_heads=(2, 2),
        num_groups=(2, 2),
        window_size=2,
        projection_dim=16,
        drop_path_rate=0.0,
    )
    text = BartConfig(**BART, **TOKENS)
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return Florence2ForConditionalGeneration(config)


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(**TEXT, **TOKENS, projection_dim=16)
    vision = CLIPVisionConfig(**PICTURE, projection_dim=16)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    return CLIPModel(config)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**BART, **TOKENS))


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4,
        "mlp_ratio": 1,
    }  # fmt: skip
    turned = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**TEXT, **TOKENS, "num_key_value_heads": 1, "rope_parameters": turned}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=31, video_token_id=30
    )
    return Qwen2VLForConditionalGeneration(config)


def distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertForTokenClassification

    config = DistilBertConfig(
        vocab_size=32, dim=16, hidden_dim=24, n_layers=2, n_heads=2, num_labels=32
    )
    return DistilBertForTokenClassification(config)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **TEXT, **TOKENS, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
    )
    return MixtralForCausalLM(config)


@dataclass(frozen=True)
class Kind:
    """One class: how to build it, and what each of its adapters targets.

    Attributes:
        build: Returns a random model.
        targets: LoRA options of each adapter.
        images: Whether the model takes pixels beside token ids.
        placeholders: Image tokens in front of a text; none where images have a tower of their own.
    """

    build: Callable[[], Any]
    targets: dict[str, dict[str, Any]]
    images: int = 0
    placeholders: int = 0


def options(r: int, alpha: int, *names: str, **more: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": alpha, "target_modules": list(names), **more}


KINDS = {
    "llava": Kind(
        llava,
        {
            "a": options(2, 4, "q_proj", "v_proj"),  # the vision tower's too
            "b": options(3, 2, "q_proj", "linear_1", "linear_2", use_rslora=True),
            "c": options(1, 3, "down_proj", "v_proj"),
        },
        images=8,
        placeholders=4,
    ),
    "florence2": Kind(
        florence2,
        {
            "a": options(2, 4, "q_proj", "v_proj"),
            "b": options(3, 2, "q_proj", "qkv", "fc1", alpha_pattern={"qkv": 6}),
            "c": options(1, 3, "fc1", "fc2"),
        },
        images=16,
        placeholders=5,
    ),
    "clip": Kind(
        clip,
        {
            "a": options(2, 4, "q_proj", "v_proj"),
            "b": options(3, 2, "q_proj", "visual_projection", "text_projection"),
            "c": options(1, 3, "fc1", "v_proj"),
        },
        images=8,
    ),
    "t5": Kind(
        t5,
        {
            "a": options(2, 4, "q", "v"),
            "b": options(3, 2, "q", "wi"),
            "c": options(1, 3, "wo", "v", "o"),
        },
    ),
    "bart": Kind(
        bart,
        {
            "a": options(2, 4, "q_proj", "v_proj"),
            "b": options(3, 2, "q_proj", "fc1"),
            "c": options(1, 3, "fc2", "v_proj"),
        },
    ),
    "qwen2_vl": Kind(
        qwen2_vl,
        {
            "a": options(2, 4, "q_proj", "v_proj"),
            "b": options(3, 2, "q_proj", "up_proj"),
            "c": options(1, 3, "down_proj", "v_proj"),
        },
    ),
    "tokens": Kind(
        distilbert,
        {
            "a": options(2, 4, "q_lin", "v_lin"),
            "b": options(3, 2, "q_lin", "lin1"),
            "c": options(1, 3, "lin2", "v_lin"),
        },
    ),
    "mixtral": Kind(
        mixtral,
        {
            "a": options(2, 4, "q_proj", "v_proj"),
            "b": options(3, 2, "q_proj", "o_proj"),
            "c": options(1, 3, "k_proj", "v_proj"),
        },
    ),
}


def inputs_for(kind: Kind, seed: int) -> dict[str, torch.Tensor]:
    """Return inputs of two examples, the second padded by two tokens."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_TOKEN, (2, 9), generator=draw)
    mask = torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = 0, 0
    ids[:, : kind.placeholders] = IMAGE_TOKEN
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind.images:
        inputs["pixel_values"] = torch.randn(2, 3, kind.images, kind.images, generator=draw)
    return inputs


def quiet(step: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return step()


def save_base(kind: Kind, folder: Path) -> Path:
    """Write a random base with weights large enough to tell a change from rounding."""
    torch.manual_seed(0)
    model = kind.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    quiet(lambda: model.save_pretrained(folder))
    return folder


def load(kind: Kind, base: Path) -> Any:
    return quiet(lambda: type(kind.build()).from_pretrained(base)).eval()


def train(kind: Kind, base: Path, name: str, folder: Path, steps: int = 3) -> Path:
    """Train one LoRA with PEFT for some optimiser steps and save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(ord(name[0]))
    model = quiet(lambda: get_peft_model(load(kind, base), LoraConfig(**kind.targets[name])))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        inputs = inputs_for(kind, 100 * ord(name[0]) + step)
        asked = {"return_loss": True} if kind.build is clip else {"labels": inputs["input_ids"]}
        loss = model(**inputs, **asked).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    quiet(lambda: model.save_pretrained(str(folder)))
    return folder


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the first thing a model gives: logits, or CLIP's scores."""
    more = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**inputs, **more)[0]
