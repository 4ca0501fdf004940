"""Where a job's output goes: a folder, or an address that pyarrow can write to.

A job always works in a folder. For an address (`s3://`, `gs://`, `hdfs://`, `file://`, whatever
`pyarrow.fs` opens) that folder is a local copy: what is already there is fetched first, so that a
rerun resumes, and everything is uploaded at the end, manifests last.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from icm_ray.config import Recipe
from icm_ray.config.places import STORAGE_VARIABLE, root_of
from icm_ray.errors import ClusterError, InputError, RecipeError, ResourceError, masked
from icm_ray.files import FULL, MANIFEST, check_place, read_manifest, sha256_of
from icm_ray.locks import beating, refuse_living
from icm_ray.suites import default_cache

SUBMITTED_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a submitted job."""
BEAT_SECONDS = 15.0
"""So often a run says at its address that it lives; each time is one small upload."""
MAX_FETCHES = 3

log = logging.getLogger(__name__)


def locate(recipe: Recipe) -> tuple[Path, str | None]:
    """Return the folder a job works in, and the address it mirrors or None.

    Raises:
        RecipeError: the output is relative in a submitted job, or no path of a folder.
        InputError: the output's place takes no folders.
        ResourceError: the output's place is full.
    """
    root, output = root_of(recipe.storage), recipe.output_path
    address = output if "://" in output else _below(root, output) if root else output
    if "://" in address:
        staging = default_cache() / "staging" / sha256_of(address)[:16]
        target = staging / Path(urlsplit(address).path).name
    else:
        target = output_folder(recipe, output)
    check_place(target)
    return target, address if "://" in address else None


def _below(root: str, output: str) -> str:
    """Return the place of an output under a root; options of an address stay at its end."""
    place, mark, options = root.partition("?") if "://" in root else (root, "", "")
    return f"{place.rstrip('/')}/{output}{mark}{options}"


def output_folder(recipe: Recipe, output: str) -> Path:
    """Return the local folder for `output`, under the storage root if it is relative.

    Raises:
        RecipeError: the job runs from a submitted, unpacked copy of a working directory and the
            output would vanish with it.
    """
    root = root_of(recipe.storage)
    target = Path(root) / output if root else Path(output)
    if not target.is_absolute() and SUBMITTED_JOB_VARIABLE in os.environ:
        raise RecipeError(
            f"output: {output!r} is relative, but a submitted job runs in a copy of the working "
            f"directory that is thrown away. Set storage: or {STORAGE_VARIABLE}."
        )
    return target.absolute()


def fetch(address: str, folder: Path) -> None:
    """Bring what `address` holds into `folder`; nothing there is fine.

    What is not as its manifest says is fetched again, and in the end left out: it is made again.

    Raises:
        ResourceError: the address cannot be opened, or this disk is full.
        ClusterError: the address does not answer.
    """
    from pyarrow import fs

    filesystem, path = _open(address)
    for left in reversed(range(MAX_FETCHES)):
        with _answering("what is there"):
            if filesystem.get_file_info(path).type != fs.FileType.Directory:
                return
        folder.mkdir(parents=True, exist_ok=True)
        _copy(filesystem, path, fs.LocalFileSystem(), str(folder))
        damaged = [place for place in folder.rglob(MANIFEST) if not _is_whole(place.parent)]
        if not damaged:
            return
        for place in () if left else damaged:
            name = place.parent.relative_to(folder.parent)
            log.warning("%s: not whole at its address, so it is made again.", name)
            shutil.rmtree(place.parent, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except InputError:
        return False
    return True


@contextlib.contextmanager
def held(address: str) -> Iterator[None]:
    """Hold the lock of an address, `<address>.lock`, for the body.

    Nothing that pyarrow opens can write a file only if there is none, so two runs that begin on two
    machines within the same moment may both go on; any later one is refused. On one machine, where
    both work in one copy, `locks.locked` tells every two apart.

    Raises:
        InputError: another run holds it.
        ResourceError: the address cannot be opened.
        ClusterError: the address does not answer, or cannot be written.
    """
    filesystem, path = _open(address)
    lock = f"{path.rstrip('/')}.lock"

    def read() -> bytes:
        with contextlib.suppress(FileNotFoundError), filesystem.open_input_stream(lock) as file:
            return file.read()
        return b""

    def write(text: bytes) -> None:
        with filesystem.open_output_stream(lock) as file:
            file.write(text)

    with contextlib.ExitStack() as stack:
        with _answering("the lock"):
            refuse_living(masked(address), read, BEAT_SECONDS)
            filesystem.create_dir(lock.rpartition("/")[0], recursive=True)
            stack.callback(_forget, filesystem, lock)
            stack.enter_context(beating(write, BEAT_SECONDS))
        yield


def _forget(filesystem: Any, path: str) -> None:
    with contextlib.suppress(OSError):  # it will be found silent
        filesystem.delete_file(path)


def publish(folder: Path, address: str) -> None:
    """Upload a folder or a single file to `address`, manifests after the files they list.

    Raises:
        ResourceError: the address cannot be opened.
        ClusterError: the address does not answer, or cannot be written.
    """
    from pyarrow import fs

    filesystem, path = _open(address)
    local = fs.LocalFileSystem()
    if folder.is_file():
        with _answering(folder.name):
            filesystem.create_dir(str(Path(path).parent), recursive=True)
        _copy(local, str(folder), filesystem, path)
        return
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == MANIFEST):
        target = f"{path}/{file.relative_to(folder).as_posix()}"
        with _answering(file.name):
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        _copy(local, str(file), filesystem, target)


def _open(address: str) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(address)
    except (pa.ArrowException, OSError, ValueError) as error:
        # The address may hold a password, so only its scheme is repeated.
        raise ResourceError(
            f"storage: a {urlsplit(address).scheme}:// address that cannot be opened "
            f"({type(error).__name__}). Check it and its credentials."
        ) from None


def _copy(source: Any, path: str, target: Any, place: str) -> None:
    from pyarrow import fs

    with _answering(Path(place).name):
        fs.copy_files(path, place, source_filesystem=source, destination_filesystem=target)


@contextlib.contextmanager
def _answering(what: str) -> Iterator[None]:
    """Say that storage failed, once pyarrow has tried it again in vain, without its address."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ClusterError(
            f"storage: {what} could not be copied ({type(error).__name__}). What is finished is "
            "kept in the cache; run the same command again once the storage answers."
        ) from None
