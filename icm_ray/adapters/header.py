"""The header of a safetensors file, checked byte by byte before the library opens the file.

The library names neither the file nor the tensor, accepts duplicate names (its scanner and its
loader then disagree), and does not recognise what people really download: pickles, LFS pointers
and error pages named `.safetensors`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from icm_ray.adapters.raw_files import parse_json, read_bytes, regular_size
from icm_ray.errors import InputError

MAX_HEADER_BYTES = 16_000_000
"""Room for the per-expert LoRA of the largest mixtures of experts, about 160 bytes a tensor."""
MAX_TENSORS = 99_999
MAX_NAME_LENGTH = 500

_DISGUISES = (
    (b"version https://git-lfs", "a Git LFS pointer", "Run 'git lfs pull'."),
    (b"PK\x03\x04", "a pickle (zip)", "Convert it to safetensors."),
    (b"\x80", "a pickle", "Convert it to safetensors."),
    (b"<", "a web page", "Download the file again."),
    (b"GGUF", "a GGUF file", "Use the PEFT adapter it was made from."),
)


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        dtype: Element type as safetensors spells it.
        shape: Its sizes.
        start: Where its bytes begin in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors a safetensors file declares, without reading one.

    Raises:
        InputError: no regular file, no safetensors file, or one that two readers could understand
            differently.
    """
    size = regular_size(file)
    start = read_bytes(file, 32)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(_disguise(file, size, start))
    header = parse_json(read_bytes(file, length, offset=8), f"{file}: header")
    if not isinstance(header, dict):
        raise InputError(f"{file}: header is no JSON object but one is expected. Save it again.")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise InputError(
            f"{file}: {len(header)} tensors but at most {MAX_TENSORS} are expected. "
            "Split the adapter."
        )
    problems = [line for name, entry in header.items() for line in _entry_problems(name, entry)]
    if problems:
        raise InputError(f"{file}: {problem}" for problem in problems)
    with open_tensors(file):  # the library's own check: no overlap, no hole, nothing cut off
        pass
    return {
        name: TensorInfo(e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in header.items()
    }


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading tensors on the CPU; errors name the file.

    Raises:
        InputError: the library refuses the file or a tensor in it.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> InputError:
    """Return what to raise where the library refuses a file or a tensor in it."""
    return InputError(
        f"{file}: damaged ({error}) but whole safetensors data is expected. Copy it again."
    )


def _entry_problems(name: str, entry: Any) -> Iterator[str]:
    segments = name.split(".")
    odd = not name.isprintable() or any(char in name for char in "/\\ ")
    if odd or "" in segments or len(name) > MAX_NAME_LENGTH:
        yield f"{name[:100]!r}: no module path but names joined by dots are expected. Rename it."
    shape = entry.get("shape") if isinstance(entry, dict) else None
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not whole or not isinstance(entry.get("dtype"), str):
        yield f"{name[:100]}: no dtype or shape but both are expected. Save the file again."


def _disguise(file: Path, size: int, start: bytes) -> str:
    for magic, what, advice in _DISGUISES:
        if start.lstrip()[: len(magic)] == magic:
            return f"{file}: {what} but a safetensors file is expected. {advice}"
    # The first bytes could be somebody's secret behind a link, so they are not repeated.
    return (
        f"{file}: no header of at most {MAX_HEADER_BYTES} bytes in its {size} bytes but a "
        "safetensors file is expected. Save it again as safetensors."
    )
