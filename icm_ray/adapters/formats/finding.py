"""Which format is this? Known by the names of files and tensors, or named and refused.

To add a format: one row in `FORMATS`, and if it can be read, one file beside this one.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from icm_ray.adapters.formats import diffusers, mlx
from icm_ray.adapters.formats.kohya import read_kohya
from icm_ray.adapters.formats.peft import INDEX_FILE, WEIGHTS_FILE, read_folder, read_sharded
from icm_ray.adapters.formats.repositories import local_copy
from icm_ray.adapters.formats.view import View
from icm_ray.adapters.header import TensorInfo, read_header
from icm_ray.adapters.policy import CONFIG_FILE
from icm_ray.errors import InputError

PICKLE_FILE = "adapter_model.bin"
Read = Callable[[Path, dict[str, TensorInfo]], View]


@dataclass(frozen=True)
class Format:
    """A format of adapters by the names of its tensors.

    Attributes:
        name: As people call it.
        sign: Regular expression; one tensor's name that holds it is enough.
        read: Gives the view of a file of this format and its header; None if it is refused.
        way_on: What to do with a file of it that is refused.
    """

    name: str
    sign: str
    read: Read | None = None
    way_on: str = ""


FORMATS = (
    Format("kohya", r"\.lora_(down|up)\.weight$", read_kohya),
    Format("LyCORIS", r"\.(hada_w[12]|lokr_w[12]|oft_)", way_on="Only plain LoRA can be merged."),
    Format(
        "diffusers",
        rf"^{diffusers.ROOTS}\..+(lora_[AB]|lora\.(down|up)|lora_linear_layer\.(down|up))\.weight$",
        diffusers.read_diffusers,
    ),
    Format("MLX", r"\.lora_[ab]$", mlx.read_mlx),
    Format(
        "torchtune",
        r"\.lora_[ab]\.weight$",
        way_on="Use the adapter_model.safetensors that its Hugging Face checkpointer writes.",
    ),
    Format(
        "NeMo",
        r"\.(adapter_layer|adapter)\.(.+\.)?linear_(in|out)\.weight$",
        way_on="Export it with NeMo to the Hugging Face PEFT format.",
    ),
)

REFUSED_FILES = (
    ("*.gguf", "a GGUF file", "Use the PEFT adapter it was made from."),
    ("*.nemo", "a NeMo archive", "Export it with NeMo to the Hugging Face PEFT format."),
    ("*.distcp", "a distributed checkpoint", "Export it to the Hugging Face PEFT format."),
    ("adapters.npz", "an MLX adapter of old", f"Save it as {mlx.WEIGHTS_FILE}."),
    ("adapter_[0-9]*.pt", "a torchtune adapter", FORMATS[-2].way_on),
    (
        PICKLE_FILE,
        "a pickle",
        "Pickles can run code: set 'allow_pickle: true' in the merge recipe to read its weights "
        "alone in a process of its own, or convert it to safetensors with PEFT.",
    ),
)
"""File names that say enough, what they are, and what to do."""

_KNOWN_FILES = (mlx.WEIGHTS_FILE, diffusers.WEIGHTS_FILE)
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")


def view_of(path: Path) -> View:
    """Recognise the adapter at `path` and see it in PEFT's words. Only headers are read.

    Args:
        path: A folder, a file, or the id of a repository in the local Hugging Face cache.

    Raises:
        InputError: saying what is there instead, and the way on.
    """
    try:
        names = sorted(os.listdir(path)) if path.is_dir() else None
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be opened ({error}) but a folder is expected. Check the path."
        ) from None
    if names is not None:
        return _folder(path, names)
    if not exists:
        return view_of(local_copy(path))
    if path.name in (CONFIG_FILE, INDEX_FILE):
        raise InputError(f"{path}: a single file but its folder is expected. Name {path.parent}.")
    _refuse_by_name(path)
    return _file(path, read_header(path))


def _folder(folder: Path, names: list[str]) -> View:
    if WEIGHTS_FILE in names:
        return _peft(folder, names)
    if INDEX_FILE in names:
        return read_sharded(folder)
    tensors = [name for name in names if name.endswith(".safetensors")]
    weights = next((name for name in _KNOWN_FILES if name in names), None)
    if weights is None and len(tensors) == 1:
        weights = tensors[0]
    if weights is not None:
        return _file(folder / weights, read_header(folder / weights))
    raise InputError(_missing(folder, names, tensors))


def _peft(folder: Path, names: Collection[str]) -> View:
    """Read a folder with PEFT's weights file, whose tensors may still be another tool's."""
    view = read_folder(folder)
    if view.header is None:
        return view
    if kind := _format_of(view.header):
        other = _as_format(kind, view.file, dict(view.header))
        # MLX keeps its own settings in a file of this name; the others know none.
        if kind.name != "MLX" and CONFIG_FILE in names:
            unread = f"{folder / CONFIG_FILE}: not read, since the weights are {kind.name}'s."
            return replace(other, notes=(*other.notes, unread))
        return other
    return view


def _file(file: Path, header: dict[str, TensorInfo]) -> View:
    if kind := _format_of(header):
        return _as_format(kind, file, header)
    if file.name == WEIGHTS_FILE and (file.parent / CONFIG_FILE).is_file():
        raise InputError(
            f"{file}: a single file but the PEFT folder that holds it is expected. "
            f"Name {file.parent}."
        )
    raise InputError(
        f"{file}: {len(header)} tensors, none of them named as by PEFT in {WEIGHTS_FILE} or by "
        f"{', '.join(kind.name for kind in FORMATS if kind.read)}, but an adapter is expected. "
        "Check the path."
    )


def _format_of(header: Iterable[str]) -> Format | None:
    return next((f for f in FORMATS if any(re.search(f.sign, key) for key in header)), None)


def _as_format(kind: Format, file: Path, header: dict[str, TensorInfo]) -> View:
    if kind.read is None:
        raise InputError(
            f"{file}: {kind.name}'s tensors but those of PEFT, kohya, diffusers or MLX are "
            f"expected. {kind.way_on}"
        )
    return kind.read(file, header)


def _refuse_by_name(path: Path) -> None:
    for pattern, what, way_on in REFUSED_FILES:
        if fnmatch(path.name.lower(), pattern):
            raise InputError(f"{path}: {what} but safetensors are expected. {way_on}")


def _missing(folder: Path, names: list[str], tensors: list[str]) -> list[str]:
    """Say what a folder without an adapter's weights holds instead."""
    if len(tensors) > 1:
        return [
            f"{folder}: {len(tensors)} safetensors files, such as {tensors[0]}, but one adapter is "
            "expected. Name one of them."
        ]
    steps = {int(m[1]): name for name in names if (m := _CHECKPOINT.fullmatch(name))}
    if steps:
        return [
            f"{folder}: a trainer's folder of checkpoints but one adapter is expected. Point at "
            f"{folder / steps[max(steps)]}, the newest."
        ]
    if {"context", "weights"} <= set(names):
        return [f"{folder}: a NeMo checkpoint but an adapter is expected. {FORMATS[-1].way_on}"]
    for name in names:
        _refuse_by_name(folder / name)
    return [
        f"{folder / name}: missing but a PEFT adapter folder holds it. Check the path."
        for name in (CONFIG_FILE, WEIGHTS_FILE)
        if name not in names
    ]
