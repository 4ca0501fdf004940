"""What a row's values must be: words, choices, turns of a conversation, and images."""

from collections.abc import Sequence
from typing import Any

from icm_ray.inputs import PLACE, Turn
from icm_ray.suites.answers import Wrong, short, text_of

Image = bytes | str
"""An image's bytes, or its path beside the table."""


def word_of(name: str, value: Any) -> str:
    """Return a short value as text: for templates, splits and documents."""
    if value is None:
        raise Wrong(f"{name}: null but a value is expected. Mend or drop the line.")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Wrong(f"{name}: {short(value)} but a text or number is expected. Mend the line.")
    return text_of(name, value, empty=True) if isinstance(value, str) else str(value)


def choices_of(name: str, value: Any) -> list[str]:
    """Return the texts to choose from."""
    if not isinstance(value, list) or len(value) < 2 or len(set(map(str, value))) < len(value):
        raise Wrong(
            f"{name}: {short(value)} but a list of two or more different texts is expected."
            " Mend or drop the line."
        )
    return [text_of(name, one) for one in value]


def turns_of(name: str, value: Any) -> tuple[tuple[Turn, ...], tuple[Image | None, ...]]:
    """Return the turns of a conversation, and the images of their parts.

    Where an image goes the content holds a PLACE; None is an image that stands in a column.
    """
    if not isinstance(value, list) or not value:
        raise Wrong(f"{name}: {short(value)} but a list of turns is expected. Mend the line.")
    turns: list[Turn] = []
    images: list[Image | None] = []
    for number, turn in enumerate(value):
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or not role:
            raise Wrong(
                f"{name}[{number}]: {short(turn)} but role and content are expected. Mend the line."
            )
        content = _content(f"{name}[{number}].content", turn.get("content"), images)
        turns.append(Turn(role, content))
    return tuple(turns), tuple(images)


def _content(name: str, value: Any, images: list[Image | None]) -> str:
    """Return a turn's content; `images` gets those of its parts."""
    if not isinstance(value, list):
        return text_of(name, value, empty=True)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            own = part.get("image") or part.get("path")
            images.append(None if own is None else image_of(f"{name}.image", own))
        elif kind != "text":
            raise Wrong(
                f"{name}: {short(value)} but texts and images are expected. Other parts are not "
                "read."
            )
        texts.append(PLACE if kind == "image" else text_of(name, part.get("text"), empty=True))
    return "".join(texts)


def image_of(name: str, value: Any) -> Image:
    """Return an image's bytes, or its path beside the table."""
    if isinstance(value, dict):  # as the datasets library stores images
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, bytes | str) or not value:
        raise Wrong(
            f"{name}: {short(value)} but an image's bytes or path is expected. Mend the line."
        )
    return value


def images_of(name: str, value: Any) -> tuple[Image, ...]:
    """Return the image of a column, or several in their order."""
    return tuple(image_of(name, one) for one in (value if isinstance(value, list) else [value]))


def placed(
    name: str, turns: Sequence[Turn], images: Sequence[Image | None], beside: Sequence[Image]
) -> tuple[Image, ...]:
    """Return the images of some turns, those of columns at their places.

    Raises:
        Wrong: places and images are not as many.
    """
    places = sum(image is None for image in images)
    if places != len(beside):
        raise Wrong(
            f"{name}: {places} places for images but {len(beside)} of them in the row. Give each "
            "image a part of type image, and name its column with image:."
        )
    if images and sum(turn.content.count(PLACE) for turn in turns) != len(images):
        raise Wrong(
            f"{name}: U+FFFC, which stands for an image, in a text, or an image in the answer. "
            "Take it out."
        )
    rest = iter(beside)
    return tuple(next(rest) if image is None else image for image in images)
