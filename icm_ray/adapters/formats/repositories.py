"""Adapters by repository id: `org/name` from the local Hugging Face cache, `org/name@REVISION`.

The network is asked only where a revision is named and the cache does not have it.
"""

import re
from pathlib import Path

from icm_ray.errors import InputError

REPOSITORY = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")
FILES = ("adapter_config.json", "*.safetensors", "*.safetensors.index.json")
"""What an adapter's repository may give; no pickle and no code is fetched."""


def local_copy(path: Path) -> Path:
    """Return the folder in the Hugging Face cache that holds a repository.

    Args:
        path: `org/name`, or `org/name@REVISION` with a branch, tag or commit.

    Raises:
        InputError: it is no id, or neither the cache nor, for a named revision, the hub has it.
    """
    parts = REPOSITORY.fullmatch(str(path))
    if parts is None or ".." in str(path):
        raise InputError(
            f"{path}: no such folder but a local adapter, or the id of a repository, is expected. "
            "Check the path."
        )
    from huggingface_hub import snapshot_download

    repository, revision = parts["id"], parts["revision"]
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception as error:  # the hub client raises a dozen unrelated types
        if revision is None:
            raise InputError(
                f"{path}: neither a local folder nor in the Hugging Face cache but an adapter is "
                f"expected. Check the path, or name {path}@REVISION to have it fetched."
            ) from error
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{path}: not a local folder, and the hub did not give it ({reason}). Check the id, "
            "the revision and the network."
        ) from error
