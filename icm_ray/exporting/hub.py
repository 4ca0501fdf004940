"""A finished folder on the Hugging Face hub: what would be uploaded, and the upload."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from icm_ray.errors import ICMRayError, InputError, RecipeError, one_line
from icm_ray.files import MANIFEST, read_json, read_manifest

CARD = "README.md"
CONFIG = "adapter_config.json"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)


@dataclass(frozen=True)
class Upload:
    """A verified folder and where it goes.

    Attributes:
        folder: The folder.
        files: Size in bytes of each file that is uploaded: those of the manifest, and itself.
        repository: `org/name`.
        revision: The branch; None for the repository's own.
        card: The front matter of its model card.
        warnings: What the hub's readers will miss, or should not see.
    """

    folder: Path
    files: dict[str, int]
    repository: str
    revision: str | None
    card: dict[str, Any]
    warnings: tuple[str, ...] = ()


def plan_upload(folder: Path, repository: str, revision: str | None = None) -> Upload:
    """Check a folder against its manifest and return what an upload of it is.

    What is not in the manifest stays here: run.json has paths and the host's name in it.

    Raises:
        RecipeError: the repository's name is none.
        InputError: a file is missing or is not what the manifest says.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise RecipeError(f"--to: {repository!r} but org/name is expected. Correct it.")
    names = [*sorted(read_manifest(folder)["files"]), MANIFEST]
    card = _front_matter(folder / CARD)
    warnings = []
    if not card.get("license"):
        warnings.append(
            f"{folder / CARD}: no license, so nobody else may use it. On the hub, add one that the "
            "licences of the base and of the adapters allow."
        )
    base = read_json(folder / CONFIG).get("base_model_name_or_path") if CONFIG in names else None
    if base and not _REPOSITORY.fullmatch(str(base)):
        warnings.append(
            f"{folder / CONFIG}: base_model_name_or_path: {str(base)!r} is a path of this machine, "
            "which others will see and cannot load. Merge with base: org/name to change it."
        )
    sizes = {name: (folder / name).stat().st_size for name in names}
    return Upload(folder, sizes, repository, revision, card, tuple(warnings))


def _front_matter(card: Path) -> dict[str, Any]:
    found = _FRONT.match(card.read_text(encoding="utf-8")) if card.is_file() else None
    try:
        table = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise InputError(f"{card}: front matter: {one_line(str(error))}. Correct it.") from error
    return table if isinstance(table, dict) else {}


def upload_lines(upload: Upload, *, private: bool) -> list[str]:
    """Return what an upload is, for the reader."""
    where = f"{upload.repository}{f'@{upload.revision}' if upload.revision else ''}"
    size = sum(upload.files.values())
    return [
        f"to {where}, {'private' if private else 'public'} if it is new:",
        *(f"  {count:>12,}  {name}" for name, count in upload.files.items()),
        f"  {size:>12,}  bytes in {len(upload.files)} files",
        f"base: {upload.card.get('base_model') or 'not named'}",
        f"license: {upload.card.get('license') or 'not named'}",
    ]


def has_token() -> bool:
    """Say whether the environment or a login of the hub's client holds a token."""
    from huggingface_hub import get_token

    return get_token() is not None


def push(upload: Upload, *, private: bool) -> str:
    """Upload in one commit, so that readers see all of it or nothing; return its address.

    The token is that of `HF_TOKEN` or of `hf auth login`; `HF_ENDPOINT` names another hub.

    Raises:
        InputError: there is no token, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not has_token():
        raise InputError(
            "HF_TOKEN: no token, nor a login, but one that may write is expected. Set it, or run "
            "hf auth login."
        )
    hub, repository = HfApi(), upload.repository
    try:
        hub.create_repo(repository, private=private or None, exist_ok=True)
        if upload.revision:
            hub.create_branch(repository, branch=upload.revision, exist_ok=True)
        operations = [CommitOperationAdd(name, str(upload.folder / name)) for name in upload.files]
        message = "Merged adapter, uploaded by icm-ray"
        commit = hub.create_commit(
            repository, operations, commit_message=message, revision=upload.revision
        )
    except ICMRayError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{repository}: the hub did not take it ({one_line(reason)}). Check the name, the "
            "token's rights and the network."
        ) from error
    return str(commit.commit_url)
