"""One base model under several names: which spellings are certainly the same model."""

import posixpath
import re
from collections.abc import Iterable

_SNAPSHOT = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]{7,64}$")
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
_QUANTISED = re.compile(r"-(?:unsloth-)?bnb-4bit$")
"""How 4-bit copies are named by those who keep them beside the original."""

_COPY = re.compile(r"[-_.](?:[2-8]-?bit|bnb|awq|gptq|gguf|fp8|nf4|int[48])(?=$|[-_.])")
"""How anybody names a quantised copy; never taken for the original without the user's word."""


def bare_name(base: str | None) -> str:
    """Return a base's name so that spellings of certainly one model are equal; "" if there is none.

    A snapshot in Hugging Face's cache and the address of a repository become its id. Ids are
    compared without letter case, as the hub does, and without the ending of a 4-bit copy by the
    same owner. Paths are compared as text, never opened.
    """
    text = _hub_id(base)
    return _QUANTISED.sub("", text.lower()) if _HUB_ID.fullmatch(text) else text


def chosen_name(names: Iterable[str | None]) -> str | None:
    """Return which of several names of one base says most: a hub id of the unquantised model first.

    Args:
        names: In the order of preference among equals; None is no name.
    """
    names = list(dict.fromkeys(name for name in names if name))
    if len(names) <= 1:
        return names[0] if names else None
    known = [_hub_id(name) for name in names]
    ids = [name for name in known if "/" in name and _HUB_ID.fullmatch(name)]
    plain = [name for name in ids if not _COPY.search(name.lower())]
    return [*plain, *ids, *known][0]


def _hub_id(base: str | None) -> str:
    """Return the repository that a cache's folder or an address stands for, else the path."""
    text = (base or "").replace("\\", "/").rstrip("/")
    if match := _SNAPSHOT.search(text):
        return f"{match[1]}/{match[2]}"
    if match := _ADDRESS.match(text):
        return match[1]
    return posixpath.normpath(text) if text else ""
