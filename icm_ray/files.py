"""Files that appear whole or not at all, and hashes that prove what they hold."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_IMODE
from typing import Any

from safetensors import SafetensorError

from icm_ray.errors import InputError, RecipeError, ResourceError
from icm_ray.swap import clear, sibling, swap

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS)
MAX_NAME_BYTES = 200
"""Of an output's name; 255 fit into a folder, and the names of temporary folders are longer."""
RUN_FILE = "run.json"
"""Holds clocks, hosts and paths; it is the one file outside the byte comparison."""
RESULTS_FILE = "results.json"
"""How a job went; written after the manifest."""
BESIDE_MANIFEST = (RUN_FILE, RESULTS_FILE)
FACTORS = "factors"
"""Folder of the adapters that a merge keeps; it has a manifest of its own."""


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
    temporary = sibling(path)
    try:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk nothing is left but an empty file


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
    """Yield a temporary sibling of `target`; on success it becomes `target` in one step.

    Every file is hashed into `manifest.json` (written last, next to `info`) and synced to disk
    first. A folder this project made before is replaced (see `swap.swap`); anything else in the
    way is refused, so nobody's files are lost. After an error nothing is left behind, and what a
    killed process left is cleared away first.

    Raises:
        InputError: `target` exists and is not a folder made by this function.
        ResourceError: the disk is full or not writable.
    """
    refuse_foreign(target)
    clear(target)
    temporary = sibling(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _seal(temporary, info or {})
        swap(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        if errno_of(error) not in NOT_WRITABLE:
            raise
        reason = getattr(error, "strerror", None) or error
        written = sum(path.lstat().st_size for path in temporary.rglob("*"))
        free = shutil.disk_usage(_nearest_folder(target)).free
        raise ResourceError(
            f"{target}: could not be written ({reason}) after {written} bytes, {free} are free. "
            "Free disk space or choose another output; an earlier result there is untouched."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def errno_of(error: BaseException) -> int | None:
    """Return the operating system's number for a failed call, or None if it was no such failure."""
    if isinstance(error, OSError):
        return error.errno
    if not isinstance(error, SafetensorError):
        return None
    number = re.search(r"os error (\d+)", str(error))  # safetensors has it in its text only
    return int(number[1]) if number else None


def check_place(target: Path) -> None:
    """Check, by making a folder there for a moment, that `target` could be written.

    Raises:
        RecipeError: it has no name, or one that no disk takes.
        InputError: its place takes no folders.
        ResourceError: its place is full.
    """
    sizes = [len(os.fsencode(part)) for part in target.parts]
    if target.name in ("", "..") or max(sizes) > 255 or sizes[-1] > MAX_NAME_BYTES:
        raise RecipeError(
            f"output: {str(target)[:60]!r} but the path of a folder with a name of at most "
            f"{MAX_NAME_BYTES} bytes is expected. Choose another."
        )
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".icm_ray-", dir=_nearest_folder(target)))
    except OSError as error:
        kind = ResourceError if error.errno in FULL else InputError
        raise kind(
            f"{target}: cannot be written ({error.strerror}) but a place for files is expected. "
            "Choose another output path."
        ) from None


def _nearest_folder(target: Path) -> Path:
    """Return the nearest parent that exists, or raise InputError if that is no folder."""
    nearest = next((parent for parent in target.parents if parent.exists()), target.parent)
    if not nearest.is_dir():
        raise InputError(f"{nearest}: exists and is no folder. Choose another output path.")
    return nearest


def refuse_foreign(target: Path) -> None:
    """Raise InputError if writing `target` would overwrite something this project did not make."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target}: exists and is no folder. Choose another output path.")
    _nearest_folder(target)
    foreign = _foreign_files(target) if target.is_dir() else []
    if foreign:
        raise InputError(
            f"{target}: holds files this project did not write ({', '.join(foreign[:3])}). Choose "
            "an empty or new folder."
        )


def refuse_inputs(target: Path, inputs: Mapping[str, Path]) -> None:
    """Raise InputError if `target` is, holds or lies in a folder that it is to be made from.

    Args:
        target: The output; links on the way to it are followed.
        inputs: Folders by what they are, such as "adapter 'law'".
    """
    place = target.resolve()
    problems = []
    for what, path in inputs.items():
        source = path.resolve()
        relation = "is" if place == source else "holds" if place in source.parents else "lies in"
        if place == source or place in source.parents or source in place.parents:
            problems.append(
                f"output: {target} {relation} the {what} ({path}) but inputs stay as they are. "
                "Choose another output path."
            )
    if problems:
        raise InputError(problems)


def _foreign_files(folder: Path) -> list[str]:
    """Return the files of a folder that no manifest of ours lists, sorted."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in files} - _listed(folder))


def _listed(folder: Path) -> set[str]:
    """Return what our manifest in a folder, and that of what a merge kept there, stand for."""
    try:
        manifest = read_json(folder / MANIFEST)
    except InputError:
        manifest = None
    # Web applications and browser extensions have a manifest.json too, so its name is not enough.
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict):
        return set()
    kept = {f"{FACTORS}/{name}" for name in _listed(folder / FACTORS)}
    return {*listed, MANIFEST, *BESIDE_MANIFEST, *kept}


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
    if (folder / FACTORS / MANIFEST).is_file():
        files = [path for path in files if not path.is_relative_to(folder / FACTORS)]
    hashes = {p.relative_to(folder).as_posix(): sha256_of_file(p) for p in files}
    write_json(folder / MANIFEST, {**info, "files": hashes})
    # What the process's umask made of a plain file and a folder. safetensors writes 0600, which
    # another user's server cannot read.
    of_files, of_folders = (S_IMODE(p.stat().st_mode) for p in (folder / MANIFEST, folder))
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(of_folders if path.is_dir() else of_files)
        _sync(path)
    _sync(folder)


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
