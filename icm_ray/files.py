"""Files that appear whole or not at all, and hashes that prove what they hold."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from icm_ray.errors import InputError, ResourceError

MANIFEST = "manifest.json"
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
RUN_FILE = "run.json"
"""Holds clocks, hosts and paths; it is the one file outside the byte comparison."""
RESULTS_FILE = "results.json"
"""How a job went; written after the manifest."""
BESIDE_MANIFEST = (RUN_FILE, RESULTS_FILE)


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: object) -> str:
    """Return the hex sha256 of a JSON-able value; key order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write `value` as sorted, indented JSON with a final newline, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file; an InputError names the file and line if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Check the path.") from None
    except OSError as error:
        raise InputError(f"{path}: could not be read ({error.strerror}).") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8, huge numbers, endless nesting
        raise InputError(f"{path}: not readable as UTF-8 JSON ({type(error).__name__}).") from None


@contextlib.contextmanager
def whole_folder(target: Path, *, info: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; on success it becomes `target` in one rename.

    Every file is hashed into `manifest.json` (written last, next to `info`) and synced to disk
    first. A folder this project made before is replaced; anything else in the way is refused, so
    nobody's files are lost. After an error nothing is left behind.

    Raises:
        InputError: `target` exists and is not a folder made by this function.
        ResourceError: the disk is full or not writable.
    """
    refuse_foreign(target)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _seal(temporary, info or {})
        _swap(temporary, target)
    except (OSError, SafetensorError) as error:
        if _number_of(error) not in NOT_WRITABLE:
            raise
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"{target}: could not be written ({reason}). Free disk space or choose another "
            "output; an earlier result there is untouched."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _number_of(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # safetensors has it in its text only
    return int(found[1]) if found else None


def refuse_foreign(target: Path) -> None:
    """Raise InputError if writing `target` would overwrite something this project did not make."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target}: exists and is no folder. Choose another output path.")
    nearest = next((parent for parent in target.parents if parent.exists()), target.parent)
    if not nearest.is_dir():
        raise InputError(f"{nearest}: exists and is no folder. Choose another output path.")
    foreign = _foreign_files(target) if target.is_dir() else []
    if foreign:
        raise InputError(
            f"{target}: holds files this project did not write ({', '.join(foreign[:3])}). Choose "
            "an empty or new folder."
        )


def refuse_inputs(target: Path, inputs: Mapping[str, Path]) -> None:
    """Raise InputError if `target` is, holds or lies in what it is to be made from.

    Args:
        target: The output.
        inputs: Folders or files by what they are, such as "base".
    """
    place = target.resolve()
    problems = [
        f"{target}: in one place with the {what} {source} but inputs stay as they are. Choose "
        "another output path."
        for what, source in inputs.items()
        if place.is_relative_to(source.resolve()) or source.resolve().is_relative_to(place)
    ]
    if problems:
        raise InputError(problems)


def _foreign_files(folder: Path) -> list[str]:
    """Return the files of a folder that its manifest does not list, sorted."""
    try:
        manifest = read_json(folder / MANIFEST)
    except InputError:
        manifest = None
    # Web applications and browser extensions have a manifest.json too, so its name is not enough.
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    ours = {*listed, MANIFEST, *BESIDE_MANIFEST} if isinstance(listed, dict) else set()
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in files} - ours)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest after checking every file against its sha256.

    Raises:
        InputError: the manifest is missing or malformed, or a file is missing or has changed.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{folder / MANIFEST}: no 'files' table. It was not written here.")
    problems = []
    for name, digest in manifest["files"].items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            problems.append(f"{path}: listed in {MANIFEST} but missing. Make the folder again.")
        elif sha256_of_file(path) != digest:
            problems.append(f"{path}: sha256 differs from {MANIFEST}. Make the folder again.")
    if problems:
        raise InputError(problems)
    return manifest


def is_done(folder: Path, key: str) -> bool:
    """Say whether `folder` holds an intact result that was made for exactly this `key`."""
    try:
        return read_manifest(folder).get("key") == key
    except InputError:
        return False


def _seal(folder: Path, info: Mapping[str, Any]) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != RUN_FILE)
    hashes = {p.relative_to(folder).as_posix(): sha256_of_file(p) for p in files}
    write_json(folder / MANIFEST, {**info, "files": hashes})
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600, which another user's server cannot read
        _sync(path)
    _sync(folder)


def _swap(temporary: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cost_of(folder: Path | None) -> float:
    """Return the processor time that what a folder holds has taken, in seconds."""
    run = folder / RUN_FILE if folder else None
    return float(read_json(run).get("cpu_seconds", 0.0)) if run and run.is_file() else 0.0
