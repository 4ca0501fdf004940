"""From what a model is asked to token ids: chat templates, answers, and what a long row loses.

A text loses its end, a prompt its oldest part behind the system's turn, but no image; what a
tokenizer puts in front of every text stays. Chat templates run in Jinja's sandbox, as transformers
runs them.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

from icm_ray.base_model.image_text import ImageProcessor
from icm_ray.errors import InputError, RecipeError
from icm_ray.inputs import PLACE, Pair, Prompt, Question, Text, Turn

UNBOUNDED = 1 << 30


class Pieces(list[int]):
    """Token ids of one example.

    Attributes:
        segments: For each token which of two texts it is of, if the model is told.
        start: Number of tokens before those that count; None if all do.
        images: Files of the images whose tokens are among them, in base64.
    """

    segments: list[int] | None = None
    start: int | None = None
    images: tuple[str, ...] = ()


def pieces_of(
    tokenizer: Any, asked: Text, limit: int, longest: int, processor: ImageProcessor | None = None
) -> Pieces:
    """Return one example's token ids.

    Args:
        tokenizer: The base's.
        asked: What is asked.
        limit: Most tokens.
        longest: Most tokens of the model, answer included.
        processor: What reads images, if the base does.
    """
    if isinstance(asked, Pair):
        return _pair(tokenizer, asked, min(limit, longest))
    if isinstance(asked, Prompt):
        return _prompt(tokenizer, asked, min(limit, longest - asked.room), processor)
    room = asked.room if isinstance(asked, Question) else 0
    ids = tokenizer(str(asked), add_special_tokens=True)["input_ids"]
    return Pieces(kept_end(ids, min(limit, longest - room), _front(tokenizer)))


def kept_end(ids: Sequence[int], limit: int, front: int, image: int | None = None) -> list[int]:
    """Return ids without the oldest behind the first `front`, so that at most `limit` are left.

    Tokens of images stay, whatever their age.

    Raises:
        InputError: the images leave no room for a word.
    """
    if len(ids) <= limit:
        return list(ids)
    room = max(limit, 1)
    loose = [place for place, token in enumerate(ids) if token != image]
    front = min(front, room - 1)
    gone = set(loose[front : front + len(ids) - room])
    if len(ids) - len(gone) > room:
        raise InputError(
            f"data: images of {len(ids) - len(loose)} tokens but a row has at most {limit}. Give "
            "fewer of them, or raise max_tokens."
        )
    return [token for place, token in enumerate(ids) if place not in gone]


def answer_ids(tokenizer: Any, asked: Text, answer: str, limit: int = UNBOUNDED) -> list[int]:
    """Return the tokens of an answer, the one that ends it included; at most `limit`."""
    ids = tokenizer(_after(asked, answer), add_special_tokens=False)["input_ids"]
    return [*ids[: max(limit - 1, 0)], end_of(tokenizer, is_chat(asked))]


def choice_ids(tokenizer: Any, asked: Text, choice: str) -> list[int]:
    """Return the tokens of a choice; how a chat goes on after it is none of its likelihood."""
    return tokenizer(_after(asked, choice), add_special_tokens=False)["input_ids"]


def is_chat(asked: Text) -> bool:
    """Say whether what is asked goes through the chat template."""
    return isinstance(asked, Prompt) and asked.chat


def end_of(tokenizer: Any, chat: bool) -> int:
    """Return the token that ends an answer: a turn of the chat template, or a text.

    Raises:
        RecipeError: there is none.
    """
    end = _turn_end(tokenizer, tokenizer.chat_template) if chat else None
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise RecipeError("base: its tokenizer has no token that ends a text, but answers need it.")
    return int(end)


def ends_of(tokenizer: Any, chat: bool) -> int | None:
    """Return the token that ends an answer, or None where decoding just goes on."""
    if tokenizer.eos_token_id is None and not chat:
        return None
    return end_of(tokenizer, chat)


def _after(asked: Text, answer: str) -> str:
    """Return an answer with the space that parts it from a plain prompt, if it needs one."""
    if not isinstance(asked, Prompt) or asked.chat:
        return answer
    text = asked.turns[-1].content
    return answer if not text or text[-1].isspace() or answer[:1].isspace() else f" {answer}"


def _pair(tokenizer: Any, pair: Pair, limit: int) -> Pieces:
    read = tokenizer(pair.text, pair.pair, truncation="longest_first", max_length=limit)
    ids = Pieces(read["input_ids"])
    ids.segments = list(read["token_type_ids"]) if "token_type_ids" in read else None
    return ids


def _prompt(tokenizer: Any, prompt: Prompt, limit: int, processor: ImageProcessor | None) -> Pieces:
    if prompt.images and processor is None:
        raise InputError(
            "data: images beside texts but the base has no vision tower, or no processor beside "
            "its weights. Name a vision-language model, or take the images out."
        )
    said: list[int] = []
    if prompt.said is not None:
        said = answer_ids(tokenizer, prompt, prompt.said, limit - 1)
    image = processor.token if processor and prompt.images else ""
    if prompt.chat:
        asks = prompt.said is not None or bool(prompt.room or prompt.choices)
        text = rendered(tokenizer, prompt.turns, asks, image)
        header = _header(tokenizer, prompt.turns)
        front = len(tokenizer(header, add_special_tokens=False)["input_ids"])
    else:
        text, front = prompt.turns[-1].content, _front(tokenizer)
        text = text.replace(PLACE, image) if image else text
    if processor and image:
        ids = processor.ids(text, prompt.images, special=not prompt.chat)
    else:
        ids = tokenizer(text, add_special_tokens=not prompt.chat)["input_ids"]
    token = processor.token_id if processor else None
    pieces = Pieces([*kept_end(ids, limit - len(said), front, token), *said])
    pieces.images = prompt.images
    if said:
        pieces.start = len(pieces) - len(said)
    return pieces


def rendered(tokenizer: Any, turns: Sequence[Turn], asks: bool, image: str = "") -> str:
    """Return a conversation as the tokenizer's own chat template writes it.

    Args:
        tokenizer: The base's.
        turns: The conversation.
        asks: Whether the assistant is to speak next.
        image: What stands for an image in a text; empty if none is there.

    Raises:
        InputError: there is no template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "base: its tokenizer has no chat template, but messages or chat: true need one. Choose "
            "a base that was trained on chats, or give plain prompts."
        )
    in_parts = _wants_parts(tokenizer, tokenizer.chat_template, bool(image))
    plain = [_as_written(turn, image, in_parts=in_parts) for turn in turns]
    try:
        return tokenizer.apply_chat_template(plain, add_generation_prompt=asks, tokenize=False)
    except Exception as error:  # a template is a program, and raises what it likes
        roles = ", ".join(turn.role for turn in turns)
        raise InputError(
            f"the base's chat template refuses turns of {roles} ({type(error).__name__}: {error}). "
            "Mend or drop the line."
        ) from None


@cache
def _wants_parts(tokenizer: Any, template: str, with_images: bool) -> bool:
    """Say whether a template gets contents as lists of parts: with images if it can, or always."""

    def reads(content: object) -> bool:
        turns = [{"role": "user", "content": content}]
        try:
            said = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # whatever a template raises of a content it does not take
            return False
        return "a word" in said and "'type'" not in said  # some write the list as it is

    text = "a word"
    return (with_images or not reads(text)) and reads([{"type": "text", "text": text}])


def _as_written(turn: Turn, image: str, *, in_parts: bool) -> dict[str, Any]:
    """Return a turn as a template gets it, with `image`, if there is one, at its places."""
    texts = turn.content.split(PLACE) if image else [turn.content]
    if not in_parts:
        return {"role": turn.role, "content": image.join(texts)}
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return {"role": turn.role, "content": parts}


def _header(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """Return what a template writes before the first words of a user: the system's turn."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    return _common(tokenizer, tokenizer.chat_template, tuple(system))


@cache
def _common(tokenizer: Any, template: str, system: tuple[Turn, ...]) -> str:
    one, other = (rendered(tokenizer, [*system, Turn("user", word)], True) for word in ("a", "b"))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(char for char, _ in same)


@cache
def _turn_end(tokenizer: Any, template: str | None) -> int | None:
    """Return the one token that a template writes after an answer; None if it is not one."""
    words = [Turn("user", "a"), Turn("assistant", "b")]
    tail = rendered(tokenizer, words, False).rpartition("b")[2].strip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return int(ids[0]) if len(ids) == 1 else None


@cache
def _front(tokenizer: Any) -> int:
    """Return how many tokens a tokenizer puts in front of every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    return full.index(plain[0]) if plain and plain[0] in full else 0
