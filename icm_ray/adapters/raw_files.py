"""Reading files that strangers wrote: regular files only, bounded sizes, strict JSON."""

import json
import math
import stat
from pathlib import Path
from typing import Any

from icm_ray.errors import InputError

LFS_POINTER = b"version https://git-lfs"
SPARSE_BYTES = 100_000_000
"""From this size on, a file that is mostly holes is refused: reading it makes zeros of them."""
SPARSE_SHARE = 0.25
"""The share of such a file that its disk must hold; a compressing disk holds more of weights."""


def regular_size(file: Path) -> int:
    """Return the size in bytes of a regular file; links are followed, as hub caches need.

    Opening a FIFO would wait for ever and a device never ends, so both are refused unopened.

    Raises:
        InputError: the file is missing, unreadable, mostly holes, or no regular file.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        link = "a dangling link" if file.is_symlink() else "missing"
        raise InputError(f"{file}: {link} but a file is expected. Check the folder.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{file}: cannot be opened ({reason}) but a file is expected. Check the path."
        ) from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise InputError(f"{file}: {kind} but a regular file is expected. Check the folder.")
    held = status.st_blocks * 512  # 0 where a network's file system does not say
    if status.st_size >= SPARSE_BYTES and 0 < held < SPARSE_SHARE * status.st_size:
        raise InputError(
            f"{file}: {held} bytes on disk but {status.st_size} are expected by its size. Copy it "
            "again, whole."
        )
    return status.st_size


def read_bytes(file: Path, count: int, offset: int = 0) -> bytes:
    """Return up to `count` bytes of a regular file.

    Raises:
        InputError: the file cannot be read.
    """
    regular_size(file)
    try:
        with file.open("rb") as handle:
            handle.seek(offset)
            return handle.read(count)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{file}: unreadable ({reason}) but a readable file is expected. Check its permissions."
        ) from None


def read_table(
    file: Path, limit: int, advice: str = "Save it again.", *, only_finite: bool = True
) -> dict[str, Any]:
    """Read a JSON file of at most `limit` bytes that holds a table, such as `adapter_config.json`.

    Args:
        file: The file.
        limit: Its largest size.
        advice: What to do about one that is too large or no table.
        only_finite: See `parse_json`.

    Raises:
        InputError: no such file, too large, or no JSON object.
    """
    size = regular_size(file)
    if size > limit:
        raise InputError(f"{file}: {size} bytes but at most {limit} are expected. {advice}")
    data = read_bytes(file, limit)
    if data.startswith(LFS_POINTER):
        raise InputError(f"{file}: a Git LFS pointer but JSON is expected. Run 'git lfs pull'.")
    raw = parse_json(data, str(file), only_finite=only_finite)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: a {type(raw).__name__} but a JSON object is expected. {advice}")
    return raw


def parse_json(data: bytes, where: str, *, only_finite: bool = True) -> Any:
    """Return the JSON value in `data`, refusing what JSON parsers disagree about.

    Duplicate keys let two readers see two different files; NaN and numbers beyond float64 are no
    JSON. The text itself is never repeated in a message: it may be somebody's secret.

    Raises:
        InputError: not UTF-8, not JSON, nested too deeply, a duplicate key, NaN or Infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{where}: {twice!r}: given twice but once is expected. Remove one.")
        return table

    def finite(text: str) -> float:
        number = float(text)
        if only_finite and not math.isfinite(number):
            raise InputError(f"{where}: {text[:20]} but a finite number is expected. Correct it.")
        return number

    advice = "Download or save the file again."
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=finite,
        )
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: line {error.lineno}: not JSON ({error.msg}) but JSON is expected. {advice}"
        ) from None
    except RecursionError:
        raise InputError(
            f"{where}: nested too deeply but a flat table is expected. {advice}"
        ) from None
    except ValueError:  # bad UTF-8, or an integer of thousands of digits
        raise InputError(f"{where}: not UTF-8 JSON but JSON is expected. {advice}") from None
