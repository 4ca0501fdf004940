"""What a model is asked before a tokenizer sees it: texts, pairs, prompts, and images beside them.

They are tuples of plain values, so that they can be hashed as JSON and sent anywhere.
"""

import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands in a turn's content where the next of its prompt's images goes."""


class Pair(NamedTuple):
    """Two texts that are read together, such as a premise and a hypothesis."""

    text: str
    pair: str


class Question(str):
    """A text that something is expected to follow: what must go of a long one is its beginning.

    Attributes:
        room: Tokens that the model's own length must leave free for an answer.
    """

    room: int

    def __new__(cls, text: str, room: int) -> "Question":
        """Return the text with its room."""
        made = super().__new__(cls, text)
        made.room = room
        return made

    def __reduce__(self) -> tuple[type, tuple[str, int]]:  # travels through Ray intact
        return type(self), (str(self), self.room)


class Turn(NamedTuple):
    """One turn of a conversation: who speaks (system, user, assistant, ...), and what is said."""

    role: str
    content: str


class Prompt(NamedTuple):
    """What a language model is asked.

    Attributes:
        turns: The conversation so far; one turn of a user where `chat` is off.
        chat: Whether the turns go through the tokenizer's chat template, else the text is read
            as it is.
        said: What follows, if the model is judged by how likely it finds that.
        choices: What may be answered, if one of several is.
        room: Tokens that the model's own length must leave free for an answer.
        images: The image files, in base64, whose places the turns hold, in their order.
    """

    turns: tuple[Turn, ...]
    chat: bool = False
    said: str | None = None
    choices: tuple[str, ...] = ()
    room: int = 0
    images: tuple[str, ...] = ()


Text = str | Pair | Prompt
"""Whatever a model that reads tokens is asked."""


def image_bytes(images: "np.ndarray") -> "Iterator[bytes]":
    """Yield the bytes of images; of those of different sizes with their shapes, one by one."""
    if images.dtype != object:
        yield images.tobytes()
        return
    for image in images:
        yield repr(image.shape).encode() + image.tobytes()


def pixels(data: bytes) -> "np.ndarray":
    """Return the pixels of an image file's bytes, uint8 `(height, width, 3)`."""
    import numpy as np
    from PIL import Image

    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return np.asarray(image.convert("RGB"))
