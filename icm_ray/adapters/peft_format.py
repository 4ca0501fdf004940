"""Adapters on disk, read strictly: every tensor is accounted for or the adapter is refused."""

import os
import warnings as python_warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icm_ray.adapters.contents import PREFIX, Contents, read_contents, tensor_keys
from icm_ray.adapters.fingerprint import largest
from icm_ray.adapters.formats import (
    WEIGHTS_FILE,
    Stored,
    StoredTensors,
    attempt,
    open_stored,
    per_expert,
    view_of,
)
from icm_ray.adapters.formats.repositories import REPOSITORY
from icm_ray.adapters.policy import check_config, has_heads_alone
from icm_ray.adapters.values import Scan, broken, not_finite, scan
from icm_ray.errors import InputError, by_cause
from icm_ray.kinds import SavedModulesPolicy
from icm_ray.types import Adapter, LoRAFactors

__all__ = ["WEIGHTS_FILE", "AdapterFile", "load_adapter", "open_adapter"]

Buffers = dict[tuple[str, tuple[int, ...]], Tensor]
"""Memory for one factor of each side and shape."""


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
        layouts: Modules that are no plain linear layer: "embedding", "conv:<k>x<k>", or
            "expert:<e>/<experts>" inside of one parameter.
        saved: Names of full tensors that are carried along, unmerged.
        notes: Warnings that needed no look at the values; `warnings` has them all.
        names: Paths in the file of what goes by a newer name here, by that name; see `renaming`.
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
    names: Mapping[str, str] = field(default_factory=dict)
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
        return *self.notes, *self._look.warnings

    @property
    def norm(self) -> float:
        """Frobenius norm of all deltas together. Cost: reads the file once.

        Raises:
            InputError: naming every tensor that holds NaN or infinity.
        """
        return self._look.norm

    @property
    def fingerprint(self) -> str:
        """`fingerprint_of` the factors, which are not held. Cost: reads the file once.

        Raises:
            InputError: naming every tensor that holds NaN or infinity.
        """
        return self._hashed.fingerprint

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
                _, factors, keys = self._read(handle, module)
                pairs = zip(keys, (factors.a, factors.b), strict=True)
                if bad := broken({key: largest(x) for key, x in pairs}):
                    raise not_finite(self.file, bad)
                yield module, factors

    def load(self) -> Adapter:
        """Read everything.

        Raises:
            InputError: naming every tensor that holds NaN or infinity.
        """
        fingerprint = self.fingerprint
        return Adapter(
            name=self.name,
            base_model=self.base_model,
            modules=dict(self.stream()),
            config=dict(self.config),
            fingerprint=fingerprint,
            dtype=self.dtype,
            layouts=self.layouts,
            saved_modules=self.whole_layers(),
        )

    def whole_layers(self) -> dict[str, Tensor]:
        """Read the full tensors that are carried along, by their path in the base model."""
        with self.open() as handle:
            return {
                path: handle.get_tensor(key)
                for path, key in zip(self.saved_names, self.saved, strict=True)
            }

    @property
    def saved_names(self) -> tuple[str, ...]:
        """Paths of the full tensors in the base model, in the order of `saved`."""
        new = {path: name for name, path in self.names.items()}
        paths = (key.removeprefix(PREFIX) for key in self.saved)
        return tuple(new.get(path, path) for path in paths)

    def renamed(self, names: Mapping[str, str]) -> "AdapterFile":
        """Return the same file with modules and full tensors under other paths: `{old: new}`."""
        return self.changed(
            shapes=dict(sorted((names.get(m, m), shape) for m, shape in self.shapes.items())),
            scaling={names.get(m, m): scaling for m, scaling in self.scaling.items()},
            layouts={names.get(m, m): layout for m, layout in self.layouts.items()},
            names={new: old for old, new in names.items()},
        )

    def changed(self, **fields: Any) -> "AdapterFile":
        """Return the same file with other fields; what a look at its values showed is kept."""
        file = replace(self, **fields)
        kept = ("_look", "_hashed")
        file.__dict__.update({k: v for k, v in self.__dict__.items() if k in kept})
        return file

    def _read(
        self, handle: Any, module: str, buffers: Buffers | None = None
    ) -> tuple[str, LoRAFactors, tuple[str, str]]:
        """Return a module's path in the file, its factors, and the names of a and b.

        In `buffers` factors last until the next of their shape; without, for good.
        """
        scaling, path = self.scaling[module], self.names.get(module, module)
        key_a, key_b = tensor_keys(path, self.layouts.get(module))
        # Upcast before scaling: in float16 the product could overflow, in bfloat16 it would round.
        a = _float32(handle.get_tensor(key_a), "a", buffers).flatten(1)
        b = _float32(handle.get_tensor(key_b), "b", buffers).flatten(1).mul_(scaling)
        return path, LoRAFactors(a, b, scaling), (key_a, key_b)

    @cached_property
    def _look(self) -> Scan:
        return vars(self).get("_hashed") or self._scan(hashed=False)

    @cached_property
    def _hashed(self) -> Scan:
        return self._scan(hashed=True)

    def _scan(self, *, hashed: bool) -> Scan:
        buffers: Buffers = {}
        with self.open() as handle:
            modules = (self._read(handle, one, buffers) for one in self._in_file_order())
            saved = ((key, handle.get_tensor(key)) for key in self.saved)
            return scan(self.file, modules, saved, hashed=hashed)

    def _in_file_order(self) -> list[str]:
        return sorted(self.shapes, key=lambda module: self.names.get(module, module))


def _float32(tensor: Tensor, side: str, buffers: Buffers | None) -> Tensor:
    """Return a copy: a view would keep a window of the mapped file in memory for each adapter.

    Memory that was touched before costs less than the conversion, new memory more.
    """
    if buffers is None:
        return tensor.to(torch.float32, copy=True)
    place = side, tuple(tensor.shape)
    if place not in buffers:
        buffers[place] = torch.empty(tensor.shape)
    return buffers[place].copy_(tensor)


def open_adapter(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    saved_modules: SavedModulesPolicy = "refuse",
    heads: bool = False,
) -> AdapterFile:
    """Check an adapter folder by its config and its weights' header. No tensor is read.

    Args:
        path: A folder or file in a known format, or a repository id: `org/name` from the local
            Hugging Face cache, `org/name@REVISION` also from the hub.
        name: The task's name; the folder's name by default.
        saved_modules: What to do with full layers that PEFT's `modules_to_save` trained.
        heads: Whether a task's own head may be among them; it is kept, and never merged.

    Raises:
        InputError: with every problem of the folder, one line each.
    """
    place = Path(os.path.expanduser(path))
    view = view_of(place)
    if heads and saved_modules == "refuse" and view.config and has_heads_alone(view.config):
        saved_modules = "keep"
    problems = list(view.problems)
    config_file = view.config_file or view.file
    config = None
    if view.config is not None:
        config = check_config(view.config, config_file, saved_modules)
        problems += config.problems
        if not config.problems:
            view = attempt(lambda: per_expert(view, config), problems) or view
    contents = Contents()
    if view.header is not None:
        contents = read_contents(view.header, config, saved_modules, view.layouts)
        problems += [f"{view.file}: {line}" for line in by_cause(contents.problems)]
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
            *(f"{config_file.absolute()}: {line}" for line in config.warnings),
            *view.notes,
            *(f"{view.file.absolute()}: {line}" for line in contents.notes),
        ),
        format=view.format,
        stored={
            key: replace(place, file=place.file.absolute()) for key, place in view.stored.items()
        },
    )


def default_name(path: Path) -> str:
    """Return what an adapter is called that got no name: as its folder, file or repository."""
    if path.is_dir():
        return path.resolve().name
    repository = None if path.exists() else REPOSITORY.fullmatch(str(path))
    return Path(repository["id"]).name if repository else path.name.removesuffix(".safetensors")


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
