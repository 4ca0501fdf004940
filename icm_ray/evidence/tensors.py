"""Evidence as methods see it: named tensors, of one module at a time, stamped with their adapters.

    evidence = read_evidence("runs/grams")        # a folder, or one safetensors file
    evidence.of("layer.0.q", ["gram.<task>"], ("law", "code"))  # {"gram.law": tensor, ...}

Names are `<module>.<kind>` or `<module>.<kind>.<task>`; docs/evidence.md lists the kinds.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.files import (
    MANIFEST,
    read_json,
    read_manifest,
    sha256_of,
    sha256_of_file,
    whole_folder,
    write_json,
)
from icm_ray.fusion_vae.model import KIND, FusionModel
from icm_ray.types import ModuleEvidence

FORMAT = 1
GRAM_FORMAT = 2
"""Of Gram statistics whose wholes are upper triangles, or that have directions and diagonals."""
GRAMS = "gram_statistics"
"""Evidence that belongs to each adapter alone; what was learned belongs to all of them together."""
TENSORS, DESCRIPTION = "evidence.safetensors", "evidence.json"
TASK = "<task>"


@dataclass(frozen=True)
class Evidence:
    """Named tensors in memory, or in a file that is read one module at a time.

    Attributes:
        kind: What they are, such as "gram_statistics"; "tensors" where nobody says.
        names: Every tensor's name.
        identity: sha256 of what is in it.
        adapters: Fingerprint of the adapter each task's tensors came from; empty where unknown.
        shared: By task, modules whose tensors stand under another module's name.
        file: The safetensors file, if it is one.
        tensors: The tensors, if they are in memory.
        described: What else is known of them, as plain data.
    """

    kind: str
    names: frozenset[str]
    identity: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    file: Path | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)

    def keys(self, module: str, kind: str, tasks: Iterable[str]) -> dict[str, str]:
        """Return `{what the method calls it: name}` of those that are there."""
        if not kind.endswith(TASK):
            name = f"{module}.{kind}"
            return {kind: name} if name in self.names else {}
        names = {}
        for task in tasks:
            of_task = kind.replace(TASK, task)
            name = f"{self.shared.get(task, {}).get(module, module)}.{of_task}"
            if name in self.names:
                names[of_task] = name
        return names

    def of(self, module: str, kinds: Iterable[str], tasks: Sequence[str]) -> ModuleEvidence:
        """Return one module's tensors by `<kind>` or `<kind>.<task>`."""
        wanted = {k: name for kind in kinds for k, name in self.keys(module, kind, tasks).items()}
        if self.file is None:
            return {key: self.tensors[name] for key, name in wanted.items()}
        with safe_open(self.file, framework="pt") as handle:
            return {key: handle.get_tensor(name) for key, name in wanted.items()}


def as_evidence(evidence: object | None) -> Evidence | None:
    """Return evidence in the one form methods use: a path, a model, or tensors by name.

    Raises:
        InputError: it is none of these, or its folder or file is broken.
    """
    if evidence is None or isinstance(evidence, Evidence):
        return evidence
    if isinstance(evidence, str | Path):
        return read_evidence(Path(evidence))
    if isinstance(evidence, FusionModel):
        found = _in_memory(evidence.tensors())
        about = evidence.described()
        return replace(found, kind=KIND, adapters=evidence.adapters, described=about)
    if isinstance(evidence, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in evidence.items()
    ):
        return _in_memory(dict(evidence))
    raise InputError(
        f"evidence: {type(evidence).__name__} but a path or tensors by name are expected. "
        "See docs/evidence.md."
    )


def _in_memory(tensors: dict[str, Tensor]) -> Evidence:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(plain.shape)}{plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return Evidence("tensors", frozenset(tensors), digest.hexdigest(), tensors=tensors)


def read_evidence(path: Path) -> Evidence:
    """Open a folder that `write_evidence` wrote, or a single safetensors file.

    Raises:
        InputError: the path is missing, broken, or its files have changed since they were written.
    """
    if path.is_file():
        return Evidence("tensors", _names(path), sha256_of_file(path), file=path.absolute())
    manifest = read_manifest(path)
    described = read_json(path / DESCRIPTION)
    kind, number = described.get("kind", "tensors"), described.get("format")
    known = (FORMAT, GRAM_FORMAT) if kind == GRAMS else (FORMAT,)
    if number not in known:
        words = " or ".join(map(str, known))
        raise InputError(f"{path}: format {number} but {words} is expected.")
    file = path.absolute() / TENSORS
    return Evidence(
        kind,
        _names(file),
        sha256_of(manifest["files"]),
        described.get("adapters", {}),
        described.get("shared", {}),
        file,
        described=described,
    )


def _names(file: Path) -> frozenset[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return frozenset(handle.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error}).") from None


def write_evidence(folder: Path, kind: str, tensors: Mapping[str, Tensor], **about: Any) -> None:
    """Write evidence that is in memory; see `new_evidence` for what is said about it."""
    with new_evidence(folder, kind, **about) as place:
        save_file({n: t.contiguous() for n, t in sorted(tensors.items())}, place)


@contextlib.contextmanager
def new_evidence(
    folder: Path,
    kind: str,
    *,
    adapters: Mapping[str, str],
    shared: Mapping[str, Mapping[str, str]] | None = None,
    described: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Yield the file that the body writes tensors to, in a new folder, all or nothing.

    `read_evidence` reads it back.

    Args:
        folder: The output.
        kind: What it is, such as "gram_statistics".
        adapters: Fingerprint by task.
        shared: By task, modules whose tensors stand under another module's name.
        described: More entries for `evidence.json`, read when the body is done.
        origin: What it was made from; stored in the manifest.
    """
    with whole_folder(folder, info=origin) as target:
        yield target / TENSORS
        content = {
            "format": FORMAT,
            "kind": kind,
            "adapters": dict(adapters),
            "shared": {task: dict(names) for task, names in (shared or {}).items()},
            **(described or {}),
        }
        write_json(target / DESCRIPTION, content)


def base_of(folder: Path) -> str | None:
    """Return what identifies the base that evidence in a folder was gathered on, if it says so."""
    return read_json(folder / MANIFEST).get("base") if folder.is_dir() else None


def model_of(evidence: Evidence) -> FusionModel:
    """Return the Fusion-VAE that evidence of its kind holds."""
    tensors = load_file(evidence.file) if evidence.file else dict(evidence.tensors)
    return FusionModel.restored(evidence.described, tensors, evidence.adapters)
