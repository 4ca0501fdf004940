"""Texts or images to batches a model takes, the same ones whoever makes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from icm_ray.base_model.image_text import ImageProcessor
from icm_ray.base_model.pictures import Preprocessing
from icm_ray.base_model.prompts import UNBOUNDED, Pieces, pieces_of
from icm_ray.errors import InputError
from icm_ray.inputs import Question, Text

Inputs = Sequence[Text] | np.ndarray
"""Texts, pairs or prompts, or uint8 images `(examples, height, width, 3)`; of different sizes, one
array each."""

Read = Sequence[Any] | np.ndarray
"""What a reader makes of inputs, one item an example; an item's length is what it costs."""


@dataclass(frozen=True)
class Batch:
    """What a model reads at once, and where it came from.

    Attributes:
        data: `(examples, tokens)` int64 token ids padded on the right, or
            `(examples, channels, height, width)` float pixels.
        mask: `(examples, tokens)` bool over the model's tokens, False on padding.
        rows: Position of each example in the original order.
        prefix: Tokens before those of an image's patches.
        pixels: `(images, channels, height, width)` float, what is read together with token ids, in
            the order of the examples; the ids hold the model's image token wherever it puts an
            image feature.
        segments: `(examples, tokens)` int64, which of two texts a token is of.
    """

    data: Shaped[Tensor, "examples ..."]
    mask: Bool[Tensor, "examples tokens"]
    rows: Int[Tensor, " examples"]
    prefix: int = field(default=0, kw_only=True)
    pixels: Float[Tensor, "images channels height width"] | None = field(default=None, kw_only=True)
    segments: Int[Tensor, "examples tokens"] | None = field(default=None, kw_only=True)

    @property
    def ids(self) -> Int[Tensor, "examples tokens"]:
        """The token ids."""
        return self.data

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        if self.data.is_floating_point():
            return {"pixel_values": self.data}
        inputs = {"input_ids": self.data, "attention_mask": self.mask.long()}
        if self.segments is not None:
            inputs["token_type_ids"] = self.segments
        return inputs if self.pixels is None else {**inputs, "pixel_values": self.pixels}


@dataclass(frozen=True)
class Answered(Batch):
    """Prompts with their answers.

    Attributes:
        answers: `(examples, tokens)`, True where the next token is one of the answer.
    """

    answers: Bool[Tensor, "examples tokens"]


@runtime_checkable
class Reader(Protocol):
    """One way of reading, for one base."""

    def read(self, inputs: Inputs, max_tokens: int) -> Read:
        """Return what each example becomes."""
        ...

    def batch(self, read: Read, rows: Sequence[int]) -> Batch:
        """Return one batch of some of the examples."""
        ...


@dataclass(frozen=True)
class TextReader:
    """Reads texts with the base's tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        longest: Most tokens that the model reads.
        processor: What reads images beside texts, if the base does.
    """

    tokenizer: Any
    longest: int = UNBOUNDED
    processor: ImageProcessor | None = None

    def read(self, inputs: Inputs, max_tokens: int) -> list[list[int]]:
        """Return each text's token ids; `prompts` says what a long one loses.

        Raises:
            InputError: they are no texts, or images stand in them that the base cannot read.
        """
        read = self._ids(inputs, max_tokens)
        for row, ids in enumerate(read):
            _check_tokens(row, ids)
            self._check_images(row, ids)
        return read

    def _ids(self, inputs: Inputs, max_tokens: int) -> list[list[int]]:
        if isinstance(inputs, np.ndarray) and inputs.size and not isinstance(inputs.flat[0], str):
            raise InputError("data: images but the base reads texts. Choose a suite of texts.")
        if all(isinstance(text, str) and not isinstance(text, Question) for text in inputs):
            texts = [str(text) for text in inputs]
            return tokenize(self.tokenizer, texts, min(max_tokens, self.longest))
        how = (max_tokens, self.longest, self.processor)
        return [pieces_of(self.tokenizer, asked, *how) for asked in inputs]

    def _check_images(self, row: int, ids: Sequence[int]) -> None:
        shown = getattr(ids, "images", ())
        if self.processor and not shown and self.processor.token_id in ids:
            raise InputError(
                f"texts: number {row} holds {self.processor.token!r}, which stands for an image, "
                "and has none. Take it out."
            )

    def overlong(self, inputs: Inputs, max_tokens: int) -> list[int]:
        """Return which examples lose tokens."""
        whole = replace(self, longest=UNBOUNDED).read(inputs, UNBOUNDED)
        cut = self.read(inputs, max_tokens)
        return [row for row, ids in enumerate(whole) if len(ids) > len(cut[row])]

    def batch(self, read: Read, rows: Sequence[int]) -> Batch:
        """Return one padded batch; where a part counts alone, it is marked."""
        own = [read[row] for row in rows]
        batch = pad_batch(own, rows, self.tokenizer.pad_token_id)
        images = [image for ids in own for image in getattr(ids, "images", ())]
        if images:
            assert self.processor is not None
            batch = replace(batch, pixels=self.processor.pixels(images))
        if any(isinstance(ids, Pieces) and ids.segments for ids in own):
            width = batch.ids.shape[1]
            parts = [getattr(ids, "segments", None) or [0] * len(ids) for ids in own]
            padded = [[*part, *[0] * (width - len(part))] for part in parts]
            return replace(batch, segments=torch.tensor(padded))
        starts = [getattr(ids, "start", None) for ids in own]
        return batch if all(start is None for start in starts) else _marked(batch, starts)


def _marked(batch: Batch, starts: Sequence[int | None]) -> "Answered":
    """Return a batch in which the tokens from `starts` on count; all where there is none."""
    place = torch.arange(batch.ids.shape[1])[None]
    first = torch.tensor([1 if start is None else start for start in starts])[:, None] - 1
    last = batch.mask.sum(1, keepdim=True) - 1
    answers = (place >= first) & (place < last)
    return Answered(batch.ids, batch.mask, batch.rows, answers, pixels=batch.pixels)


def with_answers(batch: Batch, answers: Sequence[Sequence[int]]) -> "Answered":
    """Return a batch of prompts, each followed by its answer, whose tokens count."""
    prompts = ids_of(batch)
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    padded = replace(pad_batch(whole, batch.rows.tolist(), 0), pixels=batch.pixels)
    return _marked(padded, list(map(len, prompts)))


@dataclass(frozen=True)
class ImageReader:
    """Reads images for a vision transformer.

    Attributes:
        preprocessing: What the base wants of images.
        prefix: Tokens before those of the patches (class and registers).
    """

    preprocessing: Preprocessing
    prefix: int

    def read(self, inputs: Inputs, max_tokens: int) -> Read:
        """Return the images, all of one size.

        Raises:
            InputError: they are no images, or cannot be made to fit the base.
        """
        if not isinstance(inputs, np.ndarray) or (inputs.ndim != 4 and inputs.dtype != object):
            raise InputError("data: texts but the base reads images. Choose a suite of images.")
        return self.preprocessing.sized(inputs)

    def batch(self, read: Read, rows: Sequence[int]) -> Batch:
        """Return one batch of standardised pixels."""
        images = np.stack([read[row] for row in rows])
        pixels = self.preprocessing.standardised(images)
        height, width = (side // self.preprocessing.patch for side in images.shape[1:3])
        mask = torch.ones(len(images), self.prefix + height * width, dtype=torch.bool)
        data = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        return Batch(data, mask, torch.tensor(rows), prefix=self.prefix)


def batches_of(reader: Reader, inputs: Inputs, max_tokens: int, size: int) -> list[Batch]:
    """Return batches of examples of similar length.

    Sorting by length removes most padding; ties keep their order, so the batches are a function
    of the inputs alone.
    """
    read = reader.read(inputs, max_tokens)
    return [reader.batch(read, rows) for rows in by_length(read, size)]


def by_length(read: Read, size: int) -> list[list[int]]:
    """Return which examples go together, the shortest first."""
    order = sorted(range(len(read)), key=lambda row: len(read[row]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Return the token ids of each text, special tokens included, cut to `max_tokens`.

    Raises:
        InputError: a text has no token, so there is no state to average over.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    for row, tokens in enumerate(ids):
        _check_tokens(row, tokens)
    return ids


def _check_tokens(row: int, tokens: Sequence[int]) -> None:
    if not tokens:
        raise InputError(f"texts: number {row} gives no token. Leave empty texts out.")


def make_batches(ids: Sequence[Sequence[int]], size: int, pad: int | None) -> list[Batch]:
    """Return batches of tokenised examples of similar length."""
    return [pad_batch([ids[row] for row in rows], rows, pad) for rows in by_length(ids, size)]


def pad_batch(ids: Sequence[Sequence[int]], rows: Sequence[int], pad: int | None) -> Batch:
    """Return one batch padded on the right to its longest example.

    GPT-2 and Llama have no padding token (None); any will do, since the mask covers it.
    """
    width = max(len(row) for row in ids)
    padded = torch.tensor([[*row, *[pad or 0] * (width - len(row))] for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    return Batch(padded, torch.arange(width)[None] < lengths[:, None], torch.tensor(rows))


def ids_of(batch: Batch) -> list[list[int]]:
    """Return each example's token ids without padding."""
    return [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]


def alike(batches: Mapping[str, Batch]) -> list[dict[str, Batch]]:
    """Return which batches can be joined."""
    groups: dict[tuple[object, ...], dict[str, Batch]] = {}
    for name, batch in batches.items():
        groups.setdefault(_kind(name, batch), {})[name] = batch
    return list(groups.values())


def _kind(name: str, batch: Batch) -> tuple[object, ...]:
    """Return what batches have in common that go into one forward.

    Images of several sizes cannot be one batch, and a tower's inputs are only split by examples
    where each has one image.
    """
    if batch.pixels is None:
        return tuple(batch.data.shape[2:])
    return (None if len(batch.pixels) == len(batch.rows) else name, *batch.pixels.shape[1:])


def join(batches: Sequence[Batch]) -> Batch:
    """Return one batch that holds several, padded to the longest; of one, itself."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.mask.shape[1] for batch in batches)
    mask = torch.cat([_widened(batch.mask, width) for batch in batches])
    data = [b.data if b.data.ndim > 2 else _widened(b.data, width) for b in batches]
    pixels = [batch.pixels for batch in batches if batch.pixels is not None]
    parts = [torch.zeros_like(b.data) if b.segments is None else b.segments for b in batches]
    told = any(batch.segments is not None for batch in batches)
    return Batch(
        torch.cat(data),
        mask,
        torch.cat([batch.rows for batch in batches]),
        pixels=torch.cat(pixels) if pixels else None,
        segments=torch.cat([_widened(part, width) for part in parts]) if told else None,
    )


def shares(x: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
    """Return each batch's share, without the others' padding, of what a model made of all joined.

    Args:
        x: `(examples, tokens, width)`, or `(examples, width)`.
        batches: What was joined.
    """
    if len(batches) == 1:
        return [x]
    # One split has one backward; a slice for each would fill the whole tensor as often.
    parts = x.split([len(batch.rows) for batch in batches])
    own = [batch.mask.shape[1] for batch in batches]
    width = max(own)
    return [
        part[:, :tokens] if part.ndim == 3 and tokens < width else part
        for part, tokens in zip(parts, own, strict=True)
    ]


def _widened(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


def to_device(batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return the batch on the model's device."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
