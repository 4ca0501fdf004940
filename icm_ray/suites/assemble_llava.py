"""A vision-language model of LLaVA's shape out of a vision tower, a decoder and a projector.

The projector is trained once, by `icm_ray.suites.imagetext.build_projector`, and comes with the
package; nothing is trained here.
"""

from pathlib import Path
from typing import Any

from icm_ray.errors import InputError

TOWER, DECODER = "dinov2-small", "smollm2-135m"
"""The two bases that are joined."""
PROJECTOR = Path(__file__).parent / "imagetext" / "data" / "projector.safetensors"
LAYERS = (4, 8, -1)
"""Hidden states of the tower that an image's features are made of, side by side."""
SIDE, PATCH = 84, 14
"""Of the images and their patches in pixels: 36 features an image."""
PLACE = "<file_sep>"
"""A token of the decoder that no text holds; an image's features take its places."""


def assemble_llava(tower: Path, decoder: Path, projector: Path, target: Path) -> None:
    """Write a model folder that `AutoModelForImageTextToText` and `AutoProcessor` load.

    Args:
        tower: Folder of a DINOv2 encoder.
        decoder: Folder of a Llama decoder with its tokenizer.
        projector: Safetensors with `linear_1` and `linear_2`.
        target: Folder to fill with config, float32 weights, tokenizer and processor.

    Raises:
        InputError: the projector does not fit between the two.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Dinov2Model,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    own = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.float32}
    sees = Dinov2Model.from_pretrained(tower, **own)
    says = AutoModelForCausalLM.from_pretrained(decoder, **own)
    tokenizer = AutoTokenizer.from_pretrained(decoder, local_files_only=True)
    config = LlavaConfig(
        vision_config=sees.config.to_dict(),
        text_config=says.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(PLACE),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=list(LAYERS),
        vision_feature_select_strategy="default",  # without the class token
        tie_word_embeddings=True,
    )
    parts = (
        ("model.vision_tower.", sees.state_dict()),
        ("model.language_model.", says.model.state_dict()),
        ("model.multi_modal_projector.", load_file(projector)),
    )
    tensors = {f"{place}{name}": x.float() for place, part in parts for name, x in part.items()}
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{projector}: fits not between tower and decoder ({error}).") from None
    model.tie_weights()
    model.save_pretrained(target)
    LlavaProcessor(
        image_processor(tower),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes away again
        image_token=PLACE,
    ).save_pretrained(target)


def image_processor(tower: Path) -> Any:
    """Return what makes pixels of images: of one size, standardised as the tower wants them."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(
        tower,
        local_files_only=True,
        trust_remote_code=False,
        size={"height": SIDE, "width": SIDE},
    )
