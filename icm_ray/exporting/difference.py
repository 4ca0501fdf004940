"""A LoRA out of two whole models: what fine-tuning changed in the linear layers, cut to a rank.

The difference of a model that was trained with reinforcement learning and the one before it is a
reasoning vector (arXiv 2509.01363); of any fine-tuned model and its base, what an adapter would be.
"""

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from icm_ray.adapters import save_adapter
from icm_ray.adapters.base_folder import BaseFolder, open_base, require_weights
from icm_ray.adapters.base_skeleton import build, is_language_model, own_class
from icm_ray.adapters.contents import DTYPES
from icm_ray.adapters.fingerprint import fingerprint_of
from icm_ray.adapters.header import open_tensors
from icm_ray.adapters.policy import short
from icm_ray.errors import InputError, RecipeError
from icm_ray.exporting.full_model import BLOCK_ELEMENTS
from icm_ray.exporting.stored_names import sources_of
from icm_ray.files import refuse_foreign, refuse_inputs
from icm_ray.linalg import lowrank
from icm_ray.merging.cut import RankRule, cut
from icm_ray.types import Adapter, Delta, RankPolicy

NAMED = 3
"""Tensors that a line about what is left out names."""


@dataclass(frozen=True)
class Extracted:
    """What an adapter holds of the difference of two models.

    Attributes:
        modules: Linear layers that differ.
        rank: Largest rank of one of them.
        kept: Share of the squared norm of all differences that the adapter holds, in [0, 1].
        left_out: Tensors that differ and are no weight of a linear layer, by name: the share of the
            squared norm that is in each, NaN for one of another shape.
    """

    modules: int
    rank: int
    kept: float
    left_out: Mapping[str, float]

    @property
    def lines(self) -> list[str]:
        """Return what a user should know of what is left out."""
        if not self.left_out:
            return []
        names = sorted(self.left_out, key=lambda name: (-self.left_out[name], name))
        share = sum(value for value in self.left_out.values() if not math.isnan(value))
        others = f" and {len(names) - NAMED} others" if names[NAMED:] else ""
        return [
            f"{', '.join(names[:NAMED])}{others}: changed, {share:.1%} of all change, but no "
            "weights of linear layers, so the adapter lacks them."
        ]


def extract_adapter(
    model: Path, base: Path, out: Path, rank: RankPolicy = 16, base_name: str | None = None
) -> Extracted:
    """Write the difference of two models' linear layers as an adapter of the base.

    Layers that are equal in both are left out. The difference of what is stored is exact in
    float32; the cut is the best one at its rank (see `merging.cut`).

    Paper: arXiv 2509.01363, its vector of full weights, here as a low-rank fit.

    Args:
        model: Folder of the trained model, a transformers model with safetensors.
        base: Folder of the model before, of the same architecture.
        out: The folder; appears whole or not at all.
        rank: Rank of each layer; "energy:0.9" for as many as hold that share, "exact" for all.
        base_name: What the adapter calls its base; the folder if left out.

    Raises:
        RecipeError: no such rank.
        InputError: a folder is no model of plain finite numbers, the architectures differ, or no
            linear layer does.

    Cost: three to seven readings of both models' linear layers, a block of rows at a time.
    """
    rule = RankRule.parse(rank, "exact", 1)
    if rule.kind == "total":
        raise RecipeError(f"rank: {rank!r} but a rank, 'energy:0.9' or 'exact' is expected.")
    refuse_inputs(out, {"model": model, "base": base})
    refuse_foreign(out)
    pair = _Pair(_opened(model), _opened(base))
    _refuse_others(pair)
    skeleton = build(pair.before, own_class(pair.before.config))
    squares = {key: pair.square(key) for key in _shown(sorted(pair.before.tensors), "compare")}
    layers = {
        module: layer
        for module, layer in sorted(_linear_layers(skeleton, pair.before).items())
        if squares[layer.key] > 0
    }
    if not layers:
        raise InputError(f"{model}: no linear layer differs from {base}. Name a trained model.")
    factors = {
        module: cut(pair.change(layers[module]), rule).factors for module in _shown(layers, "cut")
    }
    dtypes = {DTYPES[pair.before.tensors[layer.key][1].dtype] for layer in layers.values()}
    adapter = Adapter(
        name=model.name,
        base_model=base_name or str(base),
        modules=factors,
        config=_config(skeleton, pair.before, layers),
        fingerprint=fingerprint_of(factors),
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
    )
    save_adapter(adapter, out)
    whole = sum(value for value in squares.values() if not math.isnan(value))
    kept = sum(lowrank.norm(one.b, one.a) ** 2 for one in factors.values())
    rest = squares.keys() - {layer.key for layer in layers.values()}
    left_out = {key: squares[key] / whole for key in sorted(rest) if squares[key] != 0}
    return Extracted(len(factors), adapter.max_rank, min(kept / whole, 1.0), left_out)


def _shown(items: Collection[str], what: str) -> Iterable[str]:
    """Return the items behind a bar, where a terminal can show one."""
    is_seen = sys.stderr.isatty()
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not is_seen)


@dataclass(frozen=True)
class _Layer:
    """A linear layer's stored weight: its name, and whether it is stored as (d_in, d_out)."""

    key: str
    is_turned: bool


@dataclass(frozen=True)
class _Pair:
    """A trained model and the one before, on disk, with the same tensors."""

    after: BaseFolder
    before: BaseFolder

    def blocks(self, key: str) -> Iterator[Tensor]:
        """Yield blocks of rows of a stored tensor's difference, float32."""
        (new_file, info), (old_file, _) = (one.tensors[key] for one in (self.after, self.before))
        with open_tensors(new_file) as new, open_tensors(old_file) as old:
            if not info.shape:
                yield new.get_tensor(key).float() - old.get_tensor(key).float()
                return
            step = max(1, BLOCK_ELEMENTS // max(1, math.prod(info.shape[1:])))
            slices = new.get_slice(key), old.get_slice(key)
            for start in range(0, info.shape[0], step):
                first, second = (one[start : start + step].float() for one in slices)
                yield first - second

    def square(self, key: str) -> float:
        """Return the squared norm of a tensor's difference; NaN where the shapes differ.

        Raises:
            InputError: a value of one of them is not finite.
        """
        if self.after.tensors[key][1].shape != self.before.tensors[key][1].shape:
            return math.nan
        total = sum(float(block.double().square().sum()) for block in self.blocks(key))
        if not math.isfinite(total):
            raise InputError(
                f"{self.after.path}: {key}: NaN or infinity, there or in {self.before.path}, but "
                "finite values are expected. Save the model again."
            )
        return total

    def change(self, layer: _Layer) -> Delta:
        """Return a linear layer's change, `(d_out, d_in)`."""
        d_out, d_in = self.before.tensors[layer.key][1].shape
        if not layer.is_turned:
            return Delta((d_out, d_in), lambda: self.blocks(layer.key))
        return Delta.of(torch.cat(list(self.blocks(layer.key))).T.contiguous())


def _opened(folder: Path) -> BaseFolder:
    opened = open_base(folder)
    if opened.quantised:
        raise InputError(
            f"{opened.config_file}: quantization_config: {opened.quantised} but plain numbers are "
            "expected. Name the model that was quantised."
        )
    require_weights(opened)
    unknown = {name: i.dtype for name, (_, i) in opened.tensors.items() if i.dtype not in DTYPES}
    if unknown:
        name, dtype = next(iter(unknown.items()))
        known = ", ".join(DTYPES)
        raise InputError(f"{folder}: {name}: {dtype} but one of {known} is expected.")
    return opened


def _refuse_others(pair: _Pair) -> None:
    """Raise InputError where two models do not have the same tensors."""
    after, before = pair.after, pair.before
    kinds = [one.config.model_type for one in (after, before)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{after.config_file}: a {short(kinds[0])} but a {short(kinds[1])} as the base is "
            "expected. Name the base that it was trained from."
        )
    apart = sorted(after.tensors.keys() ^ before.tensors.keys())
    if apart:
        where = after if apart[0] in after.tensors else before
        others = f" and {len(apart) - 1} other tensors" if apart[1:] else ""
        raise InputError(
            f"{where.path}: {apart[0]}{others} but the same tensors in both models are expected. "
            "Save both with one release of transformers."
        )


def _linear_layers(model: Any, base: BaseFolder) -> dict[str, _Layer]:
    """Return every linear layer whose weight is stored as it is.

    Left out are weights that are tied to another's, as a change of one would be one of both, and
    those that the files hold in pieces or in another form.
    """
    sources = sources_of(model, {name: info.shape for name, (_, info) in base.tensors.items()})
    tied = model.all_tied_weights_keys or {}
    shared = {*tied, *tied.values()}
    layers = {}
    for module, layer in model.named_modules():
        name, kind = f"{module}.weight", type(layer).__name__
        source = sources.get(name)
        if kind not in ("Linear", "Conv1D") or source is None or name in shared:
            continue
        if len(source.keys) == 1 and source.piece is None and not source.operation:
            layers[module] = _Layer(source.keys[0], (kind == "Conv1D") != source.is_turned)
    return layers


def _config(model: Any, base: BaseFolder, layers: Mapping[str, _Layer]) -> dict[str, Any]:
    """Return what PEFT should know; short names of the layers if they select nothing else."""
    names = {module.rpartition(".")[2] for module in layers}
    selected = {m for m, _ in model.named_modules() if m.rpartition(".")[2] in names}
    return {
        "task_type": "CAUSAL_LM" if is_language_model(base.config) else None,
        "fan_in_fan_out": any(layer.is_turned for layer in layers.values()),
        "target_modules": sorted(names if selected == set(layers) else layers),
    }
