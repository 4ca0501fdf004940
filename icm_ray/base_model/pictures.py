"""Pictures as a vision model wants them: of its own size, cut and standardised as its files say."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from icm_ray.errors import InputError
from icm_ray.files import sha256_of

PREPROCESSING = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
"""Where a vision-language model says how its images and texts go together."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of red, green and blue in [0, 1], where a base says nothing of its own."""
ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Types of models that read pictures of any size; others know the one of their config."""


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of a picture before a model sees it.

    Attributes:
        folder: The base's.
        patch: Side of a patch in pixels.
        side: Side of the pictures the model reads; None: any multiple of a patch's.
    """

    folder: Path
    patch: int
    side: int | None = None

    def sized(self, images: np.ndarray) -> np.ndarray:
        """Return uint8 pictures of one size that fits, `(examples, height, width, 3)`.

        Those that fit as they are stay so; others are resized and cut by the model's own processor.

        Args:
            images: uint8, `(examples, height, width, 3)`, or as many arrays of different sizes.

        Raises:
            InputError: there is no processor to make them fit, or it makes several sizes.
        """
        if images.ndim == 4 and self._fits(images.shape[1:3]):
            return images
        if not (self.folder / PREPROCESSING).is_file():
            sizes = sorted({f"{image.shape[1]} x {image.shape[0]}" for image in images})
            wanted = f"multiples of {self.patch}" if self.side is None else f"{self.side} each"
            raise InputError(
                f"data: images of {', '.join(sizes[:3])} pixels but sides of one size, {wanted}, "
                f"are expected. Resize them, or put the model's {PREPROCESSING} beside its weights."
            )
        made = [x if self.side and self._fits(x.shape[:2]) else self._resized(x) for x in images]
        if len(sizes := {image.shape for image in made}) > 1 or not self._fits(made[0].shape[:2]):
            shown = ", ".join(sorted(f"{w} x {h}" for h, w, _ in sizes)[:3])
            raise InputError(
                f"{self.folder / PREPROCESSING}: makes images of {shown} pixels but one size that "
                f"is a multiple of {self.patch} is expected. Crop them to one shape."
            )
        return np.stack(made)

    def standardised(self, images: np.ndarray) -> np.ndarray:
        """Return uint8 pictures as float32, less the mean and over the deviation of each colour."""
        mean, deviation = self._statistics
        return (images / np.float32(255) - mean) / deviation

    def _fits(self, sides: Sequence[int]) -> bool:
        if self.side is not None:
            return set(sides) == {self.side}
        return not any(side % self.patch for side in sides)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        # One by one: a batch of different sizes may be padded to the largest.
        (pixels,) = self._processor(
            [image],
            do_rescale=False,
            do_normalize=False,
            return_tensors="np",
            input_data_format="channels_last",
        )["pixel_values"]
        return np.asarray(pixels.transpose(1, 2, 0), dtype=np.uint8)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False
        )

    @cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        said = self._said
        if said.get("do_normalize") is False:
            return np.zeros(1, np.float32), np.ones(1, np.float32)
        mean, deviation = (
            said.get(key) or usual
            for key, usual in zip(("image_mean", "image_std"), IMAGENET, strict=True)
        )
        numbers = [np.asarray(x, dtype=np.float32).reshape(-1) for x in (mean, deviation)]
        if any(x.shape not in ((1,), (3,)) or not np.isfinite(x).all() for x in numbers):
            raise InputError(
                f"{self.folder / PREPROCESSING}: image_mean and image_std: three numbers each are "
                "expected. Download the base again."
            )
        factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
        if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
            raise InputError(
                f"{self.folder / PREPROCESSING}: rescale_factor: {factor!r} but 1 / 255 is "
                "expected: other scales of pixels are not read."
            )
        return numbers[0], numbers[1]

    @cached_property
    def _said(self) -> dict[str, Any]:
        return _said_in(self.folder / PREPROCESSING)


def _said_in(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable ({error}). Download the base again.") from None
    return said if isinstance(said, dict) else {}


@cache
def preprocessing_key(folder: Path) -> str:
    """Return what identifies a base's own preprocessing; empty if it is ImageNet's without a cut.

    It decides what a vision model sees, and so belongs to whatever was measured with it.
    """
    said = _said_in(folder / PREPROCESSING)
    if with_texts := _said_in(folder / PROCESSOR):
        return sha256_of([said, with_texts])
    usual = [list(numbers) for numbers in IMAGENET]
    is_usual = [said.get("image_mean"), said.get("image_std")] == usual
    if not said or (is_usual and not said.get("do_center_crop")):
        return ""
    return sha256_of(said)
