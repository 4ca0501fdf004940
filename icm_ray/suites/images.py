"""The images of a table's rows: where their files are, and that they open."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icm_ray.errors import InputError
from icm_ray.inputs import pixels
from icm_ray.suites.columns import Columns, Record
from icm_ray.suites.hub_source import HubSource
from icm_ray.suites.lm_eval_source import LmEvalSource
from icm_ray.suites.source import Source
from icm_ray.suites.values import Image

if TYPE_CHECKING:
    import numpy as np

MAX_PIXEL_BYTES = 4_000_000_000
"""Of a split's images, which are held decoded where nothing else is read."""

AnySource = Source | HubSource | LmEvalSource


def paths_of(columns: Columns, record: Record) -> list[str]:
    """Return the images of a row that are files beside the table."""
    images = (record.asked,) if columns.shows else record.images
    return [image for image in images if isinstance(image, str)]


def astray(source: AnySource, columns: Columns, where: str, paths: Sequence[str]) -> list[str]:
    """Return a line for each image of a row that is not where it says."""
    lines = []
    for path in paths:
        try:
            source.beside(path)
        except InputError as error:
            name = ", ".join(columns.images) or columns.names["messages"]
            lines += [f"{where}: {name}: {line}" for line in error.problems]
    return lines


@dataclass
class Opening:
    """Files of images that are opened one after the other.

    Attributes:
        source: Where the rows are.
        problems: A line for each that is no image.
    """

    source: AnySource
    problems: list[str]

    def file(self, image: Image) -> bytes:
        """Return an image's bytes."""
        return image if isinstance(image, bytes) else self.source.beside(image).read_bytes()

    def decoded(self, where: str, file: bytes) -> "np.ndarray | None":
        """Return an image's pixels; None, and why, if it is none."""
        try:
            return pixels(file)
        except (OSError, ValueError) as error:  # what Pillow says of damaged or huge ones
            self.problems.append(f"{self.source}: {where}: no readable image ({error}).")
            return None


def asked_with_images(opening: Opening, records: Sequence[Record]) -> list[Any]:
    """Return what rows ask, with the images that stand in it."""
    texts = []
    for record in records:
        files = [opening.file(image) for image in record.images]
        for file in files:
            opening.decoded(record.where, file)
        images = tuple(b64encode(file).decode() for file in files)
        texts.append(record.asked._replace(images=images) if images else record.asked)  # type: ignore[union-attr]
    return texts


def images_alone(
    opening: Opening, records: Sequence[Record], *, of_one_size: bool
) -> "list[np.ndarray]":
    """Return the images of rows that hold nothing else.

    Raises:
        InputError: they are too many to hold.
    """
    images: list[np.ndarray] = []
    total = 0
    for record in records:
        image = opening.decoded(record.where, opening.file(record.asked))  # type: ignore[arg-type]
        if image is None:
            continue
        images.append(image)
        total += image.nbytes
        if total > MAX_PIXEL_BYTES:
            raise InputError(
                f"{opening.source}: {record.where}: over {MAX_PIXEL_BYTES} bytes of pixels up to "
                "here. Make the images smaller, or draw fewer (splits:)."
            )
        if of_one_size and image.shape != images[0].shape:
            sizes = [f"{one.shape[1]} x {one.shape[0]}" for one in (images.pop(), images[0])]
            opening.problems.append(
                f"{opening.source}: {record.where}: an image of {sizes[0]} but {sizes[1]} as in "
                "the first row is expected. Resize it."
            )
    return images


def check_boxes(opening: Opening, records: Sequence[Record], images: "np.ndarray") -> None:
    """Add a line for each box that leaves its image."""
    for record, image in zip(records, images, strict=True):
        height, width = image.shape[:2]
        opening.problems += [
            f"{opening.source}: {record.where}: box {box} but a box inside an image of "
            f"{width} x {height} is expected. Mend or drop the line."
            for box in record.answer or ()
            if box[2] > width or box[3] > height
        ]


def filled_up(boxes: Sequence[list[list[float]]]) -> list[list[list[float]]]:
    """Return as many boxes for each image, one at least; those of class -1 are none."""
    most = max(1, *map(len, boxes))
    return [[*own, *[[0.0, 0.0, 0.0, 0.0, -1.0]] * (most - len(own))] for own in boxes]


def together(images: "list[np.ndarray]") -> "np.ndarray":
    """Return images as one array; those of different sizes as an array of arrays."""
    import numpy as np

    if len({image.shape for image in images}) == 1:
        return np.stack(images)
    apart = np.empty(len(images), dtype=object)
    apart[:] = images
    return apart
