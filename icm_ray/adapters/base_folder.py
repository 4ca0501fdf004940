"""A base model's folder, checked like an adapter's: config, index and headers, and no value read.

transformers follows a shard index wherever it leads, adds an adapter that lies beside the weights,
and names neither file nor key when one is damaged. So what it is about to open is looked at first.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from icm_ray.adapters.header import TensorInfo, read_header
from icm_ray.adapters.policy import CONFIG_FILE as ADAPTER_CONFIG
from icm_ray.adapters.policy import short
from icm_ray.adapters.raw_files import read_table
from icm_ray.errors import InputError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 10_000_000
"""Room for the names of 21,000 classes."""
MAX_INDEX_BYTES = 100_000_000
DOWNLOAD = "Download it again."
MAX_COUNT = 100_000
"""Layers, heads, experts or labels of one model."""

LIBRARIES = {
    "bitsandbytes": ("bitsandbytes",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed-tensors",),
}
"""Quantisations that run as they are stored, and what they need beside transformers."""

_COUNTED = re.compile(r"layer|label|depth|block|expert|stage|head")
_CODE_KEYS = re.compile(r"(attn|experts)_implementation(_internal)?$")
_SHARD = re.compile(r"[\w.-]+\.safetensors")


@dataclass(frozen=True)
class BaseFolder:
    """A base on disk, checked but not loaded.

    Attributes:
        path: The folder.
        config: The transformers config.
        tensors: Of every stored tensor its file and what the header says; empty without weights.
        quantised: How the weights are packed, or None if they are plain numbers.
        skeletons: Models without weights that were built of it, by class.
    """

    path: Path
    config: Any
    tensors: Mapping[str, tuple[Path, TensorInfo]]
    quantised: str | None
    skeletons: dict[Any, nn.Module] = field(default_factory=dict)

    @property
    def config_file(self) -> Path:
        """The file that says what model it is."""
        return self.path / CONFIG_FILE


def open_base(path: Path) -> BaseFolder:
    """Check a base model's folder by its config, its shard index and its weights' headers.

    Raises:
        InputError: with every problem of the folder, one line each.
    """
    problems: list[str] = []
    config = quantised = None
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    try:
        quantised = _packing(_read_config(path / CONFIG_FILE))
        config = _parse_config(path)
    except InputError as error:
        problems += error.problems
    try:
        tensors = _read_headers(path)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    return BaseFolder(path, config, tensors, quantised)


def require_weights(base: BaseFolder) -> None:
    """Raise InputError unless the folder holds weights that can be run here."""
    if base.quantised:
        _require_library(base, base.quantised)
    if not base.tensors:
        raise InputError(
            f"{base.path}: no {WEIGHTS_FILE} and no {INDEX_FILE} but one is expected. Save the "
            "model with save_pretrained."
        )


def _require_library(base: BaseFolder, quantised: str) -> None:
    where = f"{base.config_file}: quantization_config: {short(quantised)}"
    if quantised not in LIBRARIES:
        raise InputError(
            f"{where} but one of {', '.join(sorted(LIBRARIES))} is expected. Give the base that "
            "was quantised."
        )
    wanted = LIBRARIES[quantised]
    if any(importlib.util.find_spec(name.replace("-", "_")) is None for name in wanted):
        raise InputError(
            f"{where} but {' and '.join(wanted)} is not installed. Run pip install "
            f"{' '.join(wanted)}, or give the base that was quantised."
        )


@contextlib.contextmanager
def named(where: Path, what: str) -> Iterator[None]:
    """Tell whatever transformers runs into as an InputError that names the file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # transformers raises whatever its code runs into
        reason = str(error).strip().partition("\n")[0][:150]
        raise InputError(
            f"{where}: {what} ({type(error).__name__}: {reason}) but a local transformers model "
            "with safetensors is expected. Check the base model."
        ) from error


def _read_config(file: Path) -> dict[str, Any]:
    """Return `config.json` as plain data, after every check that needs no transformers."""
    # State-space models have bounds of Infinity in their configs.
    raw = read_table(file, MAX_CONFIG_BYTES, DOWNLOAD, only_finite=False)
    problems = list(_config_problems(raw))
    if (file.parent / ADAPTER_CONFIG).exists():
        problems.append(
            f"{ADAPTER_CONFIG} lies beside it, so transformers would add that adapter, but the "
            "base alone is expected. Move one of them."
        )
    if problems:
        raise InputError(f"{file}: {problem}" for problem in problems)
    return raw


def _config_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    names = raw.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        yield (
            f"architectures: {short(names)} but a list of names is expected. Correct it, or "
            "download it again."
        )
    if raw.get("transformers_weights"):
        yield f"transformers_weights: set but {WEIGHTS_FILE} is expected. Rename the file."
    for key, value in _plain_values(raw):
        if type(value) is int and value > MAX_COUNT and _COUNTED.search(key):
            yield f"{key}: {short(value)} but at most {MAX_COUNT} are expected. Correct it."
        elif isinstance(value, str) and "/" in value and _CODE_KEYS.search(key):
            yield f"{key}: {short(value)} but no code to fetch is expected. Take the key out."


def _plain_values(raw: object) -> Iterator[tuple[str, object]]:
    """Yield every key with its value, those of inner tables too; a list's key is that of each."""
    rest = [("", raw)]
    while rest:  # no recursion: the nesting is a stranger's
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += value.items()
        elif isinstance(value, list):
            rest += [(key, one) for one in value]
        else:
            yield key, value


def _packing(raw: Mapping[str, Any]) -> str | None:
    packing = raw.get("quantization_config")
    if not packing:
        return None
    if not isinstance(packing, dict):
        return "unknown"
    # Folders of before transformers wrote the method's name are of the one library there was.
    is_bitsandbytes = packing.get("load_in_4bit") or packing.get("load_in_8bit")
    return str(packing.get("quant_method") or ("bitsandbytes" if is_bitsandbytes else "unknown"))


def _parse_config(path: Path) -> Any:
    from transformers import AutoConfig

    # trust_remote_code must be said: left open, transformers asks on the terminal.
    with named(path / CONFIG_FILE, "no config of a known model"):
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _read_headers(path: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Return the tensors of the weights that transformers would load, by name."""
    file = path / WEIGHTS_FILE
    if os.path.lexists(file):
        return {name: (file, info) for name, info in read_header(file).items()}
    if not os.path.lexists(path / INDEX_FILE):
        return {}
    places = _read_index(path / INDEX_FILE)
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    problems: list[str] = []
    for shard in sorted({path / name for name in places.values()}):
        try:
            tensors |= {name: (shard, info) for name, info in read_header(shard).items()}
        except InputError as error:
            problems += error.problems
    problems = problems or [
        f"{path / shard}: {name}: missing but {INDEX_FILE} names it. Download the file again."
        for name, shard in places.items()
        if name not in tensors or tensors[name][0] != path / shard
    ]
    if problems:
        raise InputError(problems)
    return tensors


def _read_index(file: Path) -> dict[str, str]:
    """Return the shard of every tensor; a shard is a file beside its index and nothing else."""
    places = read_table(file, MAX_INDEX_BYTES, DOWNLOAD).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{file}: no weight_map but one is expected. {DOWNLOAD}")
    for shard in places.values():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise InputError(
                f"{file}: weight_map: {short(shard)} but the name of a safetensors file in this "
                "folder is expected. Do not use this folder."
            )
    return places
