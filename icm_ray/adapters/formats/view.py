"""An adapter that another tool wrote, seen as PEFT would have written it: only names differ.

A view is made from a file's header. Its tensors stay where they are until a module is read.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from icm_ray.adapters.contents import tensor_keys
from icm_ray.adapters.header import TensorInfo, damaged, open_tensors
from icm_ray.errors import InputError

Names = Callable[[str], tuple[str, str] | None]
"""Says of a tensor's name its module and its side, "A", "B" or "alpha"; None if it is neither."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies that PEFT would call otherwise.

    Attributes:
        file: The safetensors file.
        key: The tensor's name in it.
        is_turned: Whether it is the transpose of PEFT's.
        rows: Which of its rows are meant; None for all.
        columns: Which of its columns are meant; None for all.
    """

    file: Path
    key: str
    is_turned: bool = False
    rows: range | None = None
    columns: range | None = None

    def part(self, tensor: Tensor) -> Tensor:
        """Return what is meant of the stored tensor."""
        if self.rows is not None:
            tensor = tensor[self.rows.start : self.rows.stop]
        if self.columns is not None:
            tensor = tensor[:, self.columns.start : self.columns.stop : self.columns.step]
        return tensor.T.contiguous() if self.is_turned else tensor


@dataclass(frozen=True)
class View:
    """An adapter on disk in PEFT's words.

    Attributes:
        format: The format's name, as `icm-ray inspect` shows it.
        file: The file that messages name: the weights, or the index of their shards.
        config: The PEFT config as plain data; None if it could not be read.
        header: Every tensor by PEFT's name; None if it could not be read.
        stored: Where tensors lie whose file or name differs from that.
        config_file: The file that messages about the config name.
        problems: Why one of them could not be read.
        notes: What is legal but odd.
        layouts: Modules that are an expert inside of one parameter; see `adapters.fused`.
    """

    format: str
    file: Path
    config: Mapping[str, Any] | None
    header: Mapping[str, TensorInfo] | None
    stored: Mapping[str, Stored] = field(default_factory=dict)
    config_file: Path | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layouts: Mapping[str, str] = field(default_factory=dict)


class StoredTensors:
    """Reads tensors by PEFT's names out of any number of files, each opened when first needed."""

    def __init__(
        self, file: Path, stored: Mapping[str, Stored], stack: contextlib.ExitStack
    ) -> None:
        self._file, self._stored, self._stack = file, stored, stack
        self._handles: dict[Path, Any] = {}

    def get_tensor(self, key: str) -> Tensor:
        """Return the tensor that PEFT calls `key`."""
        place, handle = self._open(key)
        try:
            tensor = handle.get_tensor(place.key)
        except (SafetensorError, OSError) as error:
            raise damaged(place.file, error) from None
        return place.part(tensor)

    def get_shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor that PEFT calls `key`; no value is read."""
        place, handle = self._open(key)
        try:
            shape = tuple(handle.get_slice(place.key).get_shape())
        except (SafetensorError, OSError) as error:
            raise damaged(place.file, error) from None
        return shape[::-1] if place.is_turned else shape

    def _open(self, key: str) -> tuple[Stored, Any]:
        place = self._stored.get(key) or Stored(self._file, key)
        if place.file not in self._handles:
            self._handles[place.file] = self._stack.enter_context(open_tensors(place.file))
        return place, self._handles[place.file]


@contextlib.contextmanager
def open_stored(file: Path, stored: Mapping[str, Stored]) -> Iterator[StoredTensors]:
    """Open a view's tensors; those that `stored` does not list are in `file` under PEFT's names."""
    with contextlib.ExitStack() as stack:
        yield StoredTensors(file, stored, stack)


def by_ending(key: str, endings: Mapping[str, str]) -> tuple[str, str] | None:
    """Return what stands before the ending of a tensor's name, and the side of that ending."""
    for side, ending in endings.items():
        if key.endswith(ending):
            return key.removesuffix(ending), side
    return None


def sort_keys(
    file: Path, header: Iterable[str], names: Names, expected: str
) -> dict[str, dict[str, str]]:
    """Return each module's tensors: `{module: {"A": key, "B": key, "alpha": key}}`.

    Args:
        file: Named in messages.
        header: The tensors' names.
        names: What a name means in this format.
        expected: What tensors the format has, for the message about any other.

    Raises:
        InputError: naming every tensor that means nothing, comes twice or lacks its partner.
    """
    modules: dict[str, dict[str, str]] = {}
    problems = []
    for key in header:
        meaning = names(key)
        if meaning is None:
            problems.append(f"{file}: {key}: unknown but {expected} are expected. {_reason(key)}")
            continue
        module, side = meaning
        if modules.setdefault(module, {}).setdefault(side, key) != key:
            problems.append(
                f"{file}: {key}: a second {side} of {module} but one is expected. Remove one."
            )
    problems += [
        f"{file}: {module}: only {', '.join(sides.values())} but both factors are expected. "
        "Save the adapter again."
        for module, sides in modules.items()
        if not {"A", "B"} <= sides.keys()
    ]
    if problems:
        raise InputError(problems)
    return modules


_NOT_PLAIN = {
    "dora_scale": "DoRA is no B A; it cannot be merged.",
    "lora_magnitude_vector": "DoRA is no B A; it cannot be merged.",
    "lora_mid": "A third factor (LoCon's CP decomposition) is no B A; train without it.",
    "hada_w": "LoHa is no B A; it cannot be merged.",
    "lokr_w": "LoKr is no B A; it cannot be merged.",
    "oft_": "OFT is no B A; it cannot be merged.",
    "diff": "Whole weight differences are not merged; extract a LoRA from them first.",
}


def _reason(key: str) -> str:
    ending = key.partition(".")[2]
    return next((why for part, why in _NOT_PLAIN.items() if part in ending), "Save it as LoRA.")


def read_alphas(
    file: Path, header: Mapping[str, TensorInfo], modules: Mapping[str, Mapping[str, str]]
) -> dict[str, float]:
    """Read the alpha of each module that has one; they are single numbers.

    Raises:
        InputError: naming every alpha that is no positive number.
    """
    keys = {module: sides["alpha"] for module, sides in modules.items() if "alpha" in sides}
    alphas, problems = {}, []
    with open_tensors(file) as handle:
        for module, key in keys.items():
            single = header[key].shape in ((), (1,))
            value = float(handle.get_tensor(key).double()) if single else 0.0
            if not 0 < value < 1e30:
                problems.append(
                    f"{file}: {key}: no positive number but one is expected. Save it again."
                )
            alphas[module] = value
    if problems:
        raise InputError(problems)
    return alphas


def stored_as_peft(
    file: Path,
    header: Mapping[str, TensorInfo],
    modules: Mapping[str, Mapping[str, str]],
    layouts: Mapping[str, str] | None = None,
    *,
    is_turned: bool = False,
) -> tuple[dict[str, TensorInfo], dict[str, Stored]]:
    """Return header and places of a file's factors under PEFT's names."""
    infos, stored = {}, {}
    for module, sides in modules.items():
        for name, side in zip(tensor_keys(module, (layouts or {}).get(module)), "AB", strict=True):
            info = header[sides[side]]
            infos[name] = TensorInfo(info.dtype, info.shape[::-1]) if is_turned else info
            stored[name] = Stored(file, sides[side], is_turned)
    return infos, stored


def plain_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], base_model: str | None = None
) -> dict[str, Any]:
    """Return the PEFT config of modules with their own ranks and alphas; no alpha means the rank.

    Args:
        ranks: Rank by module.
        alphas: Alpha by module; the factor is alpha over rank.
        base_model: What the adapter calls its base.
    """
    r = max(ranks.values(), default=1)
    anchored = {module: f"^{re.escape(module)}" for module in ranks}
    numbers = {module: alphas.get(module, float(rank)) for module, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": {anchored[m]: rank for m, rank in ranks.items() if rank != r},
        "alpha_pattern": {anchored[m]: alpha for m, alpha in numbers.items() if alpha != r},
        "target_modules": sorted(ranks),
    }


def ranks_of(
    header: Mapping[str, TensorInfo], modules: Mapping[str, Mapping[str, str]]
) -> dict[str, int]:
    """Return each module's rank: A's first size. What is no matrix counts 1 and fails later."""
    return {
        module: max((*header[sides["A"]].shape[:1], 1)[0], 1) for module, sides in modules.items()
    }
