"""A suite at an address that pyarrow opens, brought into the cache once a process."""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from icm_ray.errors import InputError
from icm_ray.files import sha256_of
from icm_ray.suites.bases import default_cache


@cache
def fetched(address: str) -> Path:
    """Return a folder with what `address` holds.

    Raises:
        InputError: the address cannot be opened or read.
    """
    import pyarrow as pa
    from pyarrow import fs

    name = Path(urlsplit(address).path).name or "suite"
    place = default_cache() / "suites" / sha256_of(address)[:16]
    place.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=place)) / name
    fresh.mkdir()
    try:
        filesystem, path = fs.FileSystem.from_uri(address)
        local = fs.LocalFileSystem()
        fs.copy_files(path, str(fresh), source_filesystem=filesystem, destination_filesystem=local)
    except (pa.ArrowException, OSError, ValueError) as error:
        shutil.rmtree(fresh.parent)
        # The address may hold a password, so only its scheme is repeated.
        raise InputError(
            f"suite: a {urlsplit(address).scheme}:// address that cannot be read "
            f"({type(error).__name__}). Check it and its credentials."
        ) from None
    target = place / name
    shutil.rmtree(target, ignore_errors=True)
    fresh.replace(target)
    fresh.parent.rmdir()
    return target
