"""What a merge keeps of its inputs, so that adapters can be added or removed without their files.

    merged/factors/adapters/<name>/    a copy of the adapter's own files
    merged/factors/evidence/           the Gram statistics it was merged with, if any
    merged/factors/order.json          what was asked for; a recipe's `earlier` reads it

The folder has a manifest of its own: an upload of the merge does not take other people's adapters
along.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_adapter
from icm_ray.adapters.policy import CONFIG_FILE
from icm_ray.config.earlier import ADAPTERS, EVIDENCE, ORDER
from icm_ray.errors import InputError
from icm_ray.evidence.gram_files import join_grams
from icm_ray.evidence.tensors import GRAMS, read_evidence
from icm_ray.files import FACTORS, whole_folder, write_json
from icm_ray.kinds import SavedModulesPolicy


def keep_factors(
    folder: Path,
    files: Sequence[AdapterFile],
    evidence: Path | None,
    order: Mapping[str, Any],
) -> None:
    """Copy what a merge was made of into `folder/factors`.

    Args:
        folder: The merge's folder.
        files: The adapters.
        evidence: What the method was told.
        order: What was asked for; see `MergeRecipe.order`.

    Raises:
        InputError: an adapter changed while it was copied.
    """
    heads = {"modules_to_save": "keep"} if any(file.saved for file in files) else {}
    if order["modules_to_save"] == "refuse":  # heads that a gathering let in stay where they are
        order = {**order, **heads}
    with whole_folder(folder / FACTORS) as target:
        for file in files:
            _copy(file, target / ADAPTERS / file.name)
        if evidence is not None and read_evidence(evidence).kind == GRAMS:
            join_grams([evidence], target / EVIDENCE, [file.name for file in files])
        write_json(target / ORDER, order)


def _copy(file: AdapterFile, folder: Path) -> None:
    home, is_alone = file.file.parent, file.path.is_file()
    sources = {file.file, *(place.file for place in file.stored.values())}
    sources |= {home / CONFIG_FILE} if (home / CONFIG_FILE).is_file() else set()
    for source in sorted(sources):
        place = folder / source.relative_to(home)
        if is_alone and source == file.file:  # whatever its ending, as a folder's only one it is
            place = folder / f"{file.name}.safetensors"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    policy: SavedModulesPolicy = "keep" if file.saved else "drop"
    if open_adapter(folder, saved_modules=policy).fingerprint != file.fingerprint:
        raise InputError(f"{file.path}: changed while it was copied. Merge again.")
