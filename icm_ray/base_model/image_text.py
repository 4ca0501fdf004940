"""Images beside texts: what a vision-language model's own processor makes of them.

Models of LLaVA's shape put an image's features in the places of image tokens, so that an image is
some tokens of the text and its pixels ride along.
"""

from base64 import b64decode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.adapters.base_folder import named
from icm_ray.adapters.base_skeleton import is_image_text
from icm_ray.base_model.pictures import PREPROCESSING, PROCESSOR
from icm_ray.errors import InputError
from icm_ray.inputs import pixels


@dataclass(frozen=True, eq=False)
class ImageProcessor:
    """A vision-language model's processor.

    Attributes:
        own: transformers' own.
    """

    own: Any

    @property
    def token(self) -> str:
        """What stands for an image in a text."""
        return self.own.image_token

    @property
    def token_id(self) -> int:
        """The token that an image's features take the places of."""
        return self.own.tokenizer.convert_tokens_to_ids(self.token)

    def ids(self, text: str, images: Sequence[str], *, special: bool) -> list[int]:
        """Return a text's tokens, as many for each image as it has features.

        Args:
            text: Holds `token` where an image goes.
            images: The images' files, in base64.
            special: Whether to add the tokens that the tokenizer puts around every text.

        Raises:
            InputError: the text has other places, or the model reads more than pixels.
        """
        known = Counter(["pixel_values", *self.own.tokenizer.model_input_names])
        if more := sorted(Counter(self.own.model_input_names) - known):
            raise InputError(
                f"base: its processor gives {', '.join(more)} beside images, which are not read. "
                "Choose a base of LLaVA's shape, whose images are pixels alone."
            )
        if (found := text.count(self.token)) != len(images):
            raise InputError(
                f"data: {len(images)} images but {found} times {self.token!r} in what the base "
                "reads. Its chat template has no place for an image, or a text holds that word."
            )
        shown = [_opened(image) for image in images]
        (ids,) = self.own(text=[text], images=[shown], add_special_tokens=special)["input_ids"]
        return list(ids)

    def pixels(self, images: Sequence[str]) -> Float[Tensor, "images channels height width"]:
        """Return images as the model's vision tower reads them.

        Raises:
            InputError: the processor makes several sizes of them.
        """
        own = self.own.image_processor
        made = [own([_opened(image)], return_tensors="pt")["pixel_values"] for image in images]
        if len({one.shape[1:] for one in made}) > 1:
            raise InputError(
                "base: its processor makes images of several sizes but one is expected. Crop them "
                "to one shape."
            )
        return torch.cat(made)


def _opened(image: str) -> np.ndarray:
    return pixels(b64decode(image))


def load_processor(path: Path, config: Any) -> ImageProcessor | None:
    """Return a vision-language model's processor; None for other models, or if it has none.

    Raises:
        InputError: transformers cannot load it.
    """
    from transformers import AutoProcessor

    files = (path / PROCESSOR, path / PREPROCESSING)
    if not is_image_text(config) or not any(file.is_file() for file in files):
        return None
    with named(path, "no loadable processor"):
        own = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return ImageProcessor(own) if hasattr(own, "image_token") else None
