"""How names and numbers are written: short, safe, and the same in every output."""

import html
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import TypeGuard

MISSING = "\N{EN DASH}"


def is_number(value: float | None) -> TypeGuard[float]:
    """Say whether `value` is a finite number."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Return 0.7126 as "0.713", and a dash for None or NaN."""
    return f"{value:z.{digits}f}" if is_number(value) else MISSING


def percent(value: float | None) -> str:
    """Return 0.7126 as "71.3 %", and a dash for None or NaN."""
    return f"{100 * value:z.1f} %" if is_number(value) else MISSING


def plain(text: str) -> str:
    """Return `text` with control, bidi and separator characters escaped; newlines stay.

    Task and module names come from strangers. An escape sequence would break the XML of a picture
    and a right-to-left override would rewrite what the reader sees.
    """
    return "".join(
        f"\\x{ord(char):02x}" if _is_hidden(char) and char != "\n" else char for char in text
    )


def _is_hidden(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] == "C" or category in ("Zl", "Zp")


def clip(text: str, width: int = 24) -> str:
    """Return `text` safe, on one line and at most `width` characters; the middle is what goes."""
    text = plain(text).replace("\n", " ")
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def markdown(text: str) -> str:
    """Return `text` so that Markdown, and the HTML inside it, shows it letter by letter."""
    text = html.escape(plain(text).replace("\n", " "), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def method_label(method: str, tuned: bool) -> str:
    """Return the label of one row: the method, and whether it was tuned."""
    return f"{method} (tuned)" if tuned else method


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def short_modules(modules: Iterable[str]) -> dict[str, str]:
    """Return a short label for each module: "encoder.layer.3.attention.query" as "3.query".

    The layer's number and the last word of the path, and as many words before it as it takes to
    tell modules apart.
    """
    paths = sorted(set(modules), key=natural_key)
    words = dict.fromkeys(paths, 1)
    for _ in range(max((path.count(".") for path in paths), default=0)):
        labels = {path: _short(path, words[path]) for path in paths}
        seen = Counter(labels.values())
        for path in paths:
            words[path] += seen[labels[path]] > 1
    return {path: clip(_short(path, words[path]), 28) for path in paths}


def _short(path: str, words: int) -> str:
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    layer = numbers[-1] if numbers else -1
    return ".".join(([parts[layer]] if numbers else []) + parts[layer + 1 :][-words:])
