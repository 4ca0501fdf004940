"""What every builder of images gives: a picture, its target, and what it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Painted:
    """One example before it is encoded.

    Args:
        image: Grey or RGB.
        target: Class index or number, one of either for each patch in reading order, or the
            corners in pixels and class of each thing, `(things, 5)`; by column where several
            tasks read one picture, words among them.
        document: What it was made from: a typeface, a photograph, a scene.
    """

    image: Image.Image
    target: float | np.ndarray | Mapping[str, np.ndarray | str]
    document: str
