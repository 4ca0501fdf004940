"""Adapters on disk, read strictly: every tensor is accounted for or the adapter is refused."""

import hashlib
import math
import os
import warnings as python_warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from icm_ray.adapters.contents import PREFIX, Contents, read_contents, tensor_keys
from icm_ray.adapters.fingerprint import add_to_digest, largest, squared_norm
from icm_ray.adapters.formats import WEIGHTS_FILE, Stored, StoredTensors, open_stored, view_of
from icm_ray.adapters.policy import check_config
from icm_ray.errors import InputError
from icm_ray.types import Adapter, LoRAFactors, SavedModulesPolicy

__all__ = ["WEIGHTS_FILE", "AdapterFile", "load_adapter", "open_adapter"]

HUGE = 1e18
"""Beyond this a squared entry leaves float32, so norms and cosines of the adapter do too."""


@dataclass(frozen=True)
class Scan:
    """What one pass over all values found.

    Attributes:
        fingerprint: As `fingerprint_of` gives it.
        norm: Frobenius norm of all deltas together.
        warnings: What is finite but odd about the values.
    """

    fingerprint: str
    norm: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, checked but not loaded: config and shapes are known, values are not.

    Attributes:
        name: The task's name.
        path: The adapter's folder, or its file where that is all of it.
        file: The weights file, or the index of its shards.
        base_model: What the config calls its base, or None.
        config: The PEFT config as plain data.
        dtype: Element type of the factors; the widest one if they are mixed.
        shapes: `(d_out, d_in, rank)` of every module, sorted by module path.
        scaling: alpha / rank (rsLoRA: alpha / sqrt(rank)) of every module.
        layouts: Modules that are no plain linear layer: "embedding" or "conv:<k>x<k>".
        saved: Names of full tensors that are carried along, unmerged.
        notes: Warnings that needed no look at the values; `warnings` has them all.
        format: The format's name: "PEFT", "PEFT, sharded", "kohya", "diffusers" or "MLX".
        stored: Where tensors lie whose file or name is not PEFT's.
    """

    name: str
    path: Path
    file: Path
    base_model: str | None
    config: Mapping[str, Any]
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, int, int]]
    scaling: Mapping[str, float]
    layouts: Mapping[str, str] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    format: str = "PEFT"
    stored: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all weights files on disk."""
        files = {place.file for place in self.stored.values()} or {self.file}
        return sum(file.stat().st_size for file in files)

    def open(self) -> AbstractContextManager[StoredTensors]:
        """Open the weights for reading tensors by PEFT's names."""
        return open_stored(self.file, self.stored)

    @property
    def modules(self) -> Mapping[str, tuple[int, int, int]]:
        """The adapted modules, as keys; stands in for `Adapter.modules` before loading."""
        return self.shapes

    @property
    def max_rank(self) -> int:
        """Largest rank of any module."""
        return max((rank for _, _, rank in self.shapes.values()), default=0)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Everything legal that should not pass in silence. Cost: reads the file once."""
        return *self.notes, *self._scan.warnings

    @property
    def norm(self) -> float:
        """Frobenius norm of all deltas together. Cost: reads the file once."""
        return self._scan.norm

    def fingerprint(self) -> str:
        """Return `fingerprint_of` the factors without holding them. Cost: reads the file once.

        Raises:
            InputError: naming every tensor that holds NaN or infinity.
        """
        return self._scan.fingerprint

    def factors(self, module: str) -> LoRAFactors:
        """Read one module: `a` is `(rank, d_in)`, `b` is `(d_out, rank)`, float32, scaled.

        Raises:
            InputError: a value is not finite, or the file changed since it was opened.
            KeyError: the adapter has no such module.
        """
        return next(self.stream([module]))[1]

    def stream(self, modules: Iterable[str] | None = None) -> Iterator[tuple[str, LoRAFactors]]:
        """Yield `(module, factors)` one by one, opening the file once; all modules by default.

        Raises:
            InputError: a value is not finite, or the file changed since it was opened.
        """
        with self.open() as handle:
            for module in self.shapes if modules is None else modules:
                factors, problems = self._read(handle, module)
                if problems:
                    raise InputError(problems)
                yield module, factors

    def load(self) -> Adapter:
        """Read everything.

        Raises:
            InputError: naming every tensor that holds NaN or infinity.
        """
        fingerprint = self.fingerprint()
        with self.open() as handle:
            saved = {key.removeprefix(PREFIX): handle.get_tensor(key) for key in self.saved}
        return Adapter(
            name=self.name,
            base_model=self.base_model,
            modules=dict(self.stream()),
            config=dict(self.config),
            fingerprint=fingerprint,
            dtype=self.dtype,
            layouts=self.layouts,
            saved_modules=saved,
        )

    def _read(self, handle: Any, module: str) -> tuple[LoRAFactors, list[str]]:
        scaling = self.scaling[module]
        key_a, key_b = tensor_keys(module, self.layouts.get(module))
        # Upcast before scaling: in float16 the product could overflow, in bfloat16 it would round.
        # A copy, because a view would keep a window of the mapped file in memory for each adapter.
        a = handle.get_tensor(key_a).to(torch.float32, copy=True).flatten(1)
        b = handle.get_tensor(key_b).float().flatten(1) * scaling
        problems = [
            f"{self.file}: {key}: NaN or infinity but finite float32 values are expected. "
            "Train or export the adapter again."
            for key, values in ((key_a, a), (key_b, b))
            if not math.isfinite(largest(values))
        ]
        return LoRAFactors(a, b, scaling), problems

    @cached_property
    def _scan(self) -> Scan:
        digest = hashlib.sha256()
        problems: list[str] = []
        zero: list[str] = []
        huge: list[str] = []
        squares = 0.0
        with self.open() as handle:
            for module in self.shapes:
                factors, found = self._read(handle, module)
                problems += found
                add_to_digest(digest, module, factors)
                squares += squared_norm(factors)
                peaks = largest(factors.a), largest(factors.b)
                zero += [module] if 0 in peaks else []
                huge += [module] if max(peaks) > HUGE else []
            problems += [
                f"{self.file}: {key}: NaN or infinity but finite values are expected. Save again."
                for key in self.saved
                if not torch.isfinite(handle.get_tensor(key)).all()
            ]
        if problems:
            raise InputError(problems)
        notes = [
            f"{self.file}: {modules[0]}: {what} in {len(modules)} of {len(self.shapes)} modules."
            for modules, what in (
                (zero, "all-zero change"),
                (huge, f"values beyond {HUGE:.0e}"),
            )
            if modules
        ]
        return Scan(digest.hexdigest(), squares**0.5, tuple(notes))


def open_adapter(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    saved_modules: SavedModulesPolicy = "refuse",
) -> AdapterFile:
    """Check an adapter folder by its config and its weights' header. No tensor is read.

    Args:
        path: A folder or file in a known format, or a repository id: `org/name` from the local
            Hugging Face cache, `org/name@REVISION` also from the hub.
        name: The task's name; the folder's name by default.
        saved_modules: What to do with full layers that PEFT's `modules_to_save` trained.

    Raises:
        InputError: with every problem of the folder, one line each.
    """
    place = Path(path)
    view = view_of(place)
    problems = list(view.problems)
    config = None
    if view.config is not None:
        try:
            config = check_config(view.config, view.config_file or view.file, saved_modules)
        except InputError as error:
            problems += error.problems
    contents = Contents()
    if view.header is not None:
        contents = read_contents(view.header, config, saved_modules)
        problems += [f"{view.file}: {line}" for line in contents.problems]
    if problems or config is None:
        raise InputError(problems)
    return AdapterFile(
        name=default_name(place) if name is None else name,
        # Workers run in other folders, and what a revision names may change.
        path=place.absolute() if place.exists() else view.file.parent,
        file=view.file.absolute(),
        base_model=config.raw.get("base_model_name_or_path") or None,
        config=config.raw,
        dtype=contents.dtype,
        shapes=contents.shapes,
        scaling=contents.scaling,
        layouts=contents.layouts,
        saved=contents.saved,
        notes=(
            *config.warnings,
            *view.notes,
            *(f"{view.file}: {n}" for n in contents.notes),
        ),
        format=view.format,
        stored=view.stored,
    )


def default_name(path: Path) -> str:
    """Return what an adapter is called that got no name: as its folder, file or repository."""
    if path.is_dir():
        return path.resolve().name
    return path.name.partition("@")[0].removesuffix(".safetensors")


def load_adapter(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    saved_modules: SavedModulesPolicy = "refuse",
) -> Adapter:
    """Read a PEFT LoRA adapter into memory, scaling folded into `b`, everything in float32.

    What is legal but odd is told through Python's `warnings`.

    Args:
        path: A folder or file in a known format, or a repository id: `org/name` from the local
            Hugging Face cache, `org/name@REVISION` also from the hub.
        name: The task's name; the folder's name by default.
        saved_modules: What to do with full layers that PEFT's `modules_to_save` trained.

    Raises:
        InputError: with every problem of the folder, one line each.
    """
    file = open_adapter(path, name, saved_modules=saved_modules)
    adapter = file.load()
    for line in file.warnings:
        python_warnings.warn(line, stacklevel=2)
    return adapter
