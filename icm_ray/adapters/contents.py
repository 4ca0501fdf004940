"""Which tensor is which: from safetensors keys to LoRA modules, with nothing left over."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from icm_ray.adapters.config_keys import FOLD
from icm_ray.adapters.fused import is_expert, matched_path
from icm_ray.adapters.gaps import covered, find_gaps, most_siblings, plain_names, unused
from icm_ray.adapters.header import TensorInfo
from icm_ray.adapters.policy import WHOLE, PlainConfig, short

PREFIX = "base_model.model."
EMBEDDING = "embedding"
MAX_WIDTH = 2**24
"""Rows or columns of a layer; the largest vocabularies and layers have under a million."""
MAX_SIBLINGS = 4096
"""Layers or experts side by side; what loads adapters takes their number squared."""
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_LINEAR_KEYS = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING_KEYS = (".lora_embedding_A", ".lora_embedding_B")
_SAVED_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
"""Full layers PEFT adds on its own when the vocabulary was resized."""
_TRANSPOSED_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""The layers of GPT-2 and its kin, whose weights are stored as (d_in, d_out)."""

_OWN_CONFIG = "Use the config that was saved with these weights."

Pair = tuple[TensorInfo, TensorInfo]


@dataclass
class Contents:
    """What a weights file holds, and everything that is wrong or odd about it."""

    dtype: torch.dtype = torch.float32
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tensor_keys(module: str, layout: str | None) -> tuple[str, str]:
    """Return the names of a module's A and B tensor in a PEFT file."""
    suffix_a, suffix_b = _EMBEDDING_KEYS if layout == EMBEDDING else _LINEAR_KEYS
    return f"{PREFIX}{module}{suffix_a}", f"{PREFIX}{module}{suffix_b}"


def kernel_of(layout: str | None) -> tuple[int, ...]:
    """Return the kernel sizes of a convolution's layout; nothing for the other layouts."""
    if layout is None or layout == EMBEDDING or is_expert(layout):
        return ()
    return tuple(int(size) for size in layout.removeprefix("conv:").split("x"))


def read_contents(
    header: Mapping[str, TensorInfo],
    config: PlainConfig | None,
    saved_modules: str,
    experts: Mapping[str, str] | None = None,
) -> Contents:
    """Sort a header's tensors into modules and check each against the config.

    Args:
        header: Tensors by name.
        config: The config, or None if there is none; ranks are checked if it is a plain LoRA's.
        saved_modules: Policy for full layers: refuse, drop, keep or mean.
        experts: Layouts of the modules that are an expert inside of one parameter.
    """
    contents = Contents()
    pairs, others = _pair_up(header, contents)
    _place_others(others, pairs, config, saved_modules, contents)
    for module, (a, b) in sorted(pairs.items()):
        problems = _shape_problems(module, a, b)
        contents.problems += problems
        if not problems:
            contents.shapes[module] = (b.shape[0], math.prod(a.shape[1:]), a.shape[0])
            if layout := (experts or {}).get(module) or _layout(module, a, header):
                contents.layouts[module] = layout
    if not pairs and not contents.problems:
        problem = (
            f"but keys such as {PREFIX}<module>.lora_A.weight are expected. Save it with PEFT."
        )
        contents.problems.append((f"{len(header)} tensors, none of them LoRA", problem))
    if (siblings := most_siblings(pairs)) > MAX_SIBLINGS:
        expected = f"at most {MAX_SIBLINGS} are expected. Split the adapter."
        contents.problems.append((f"{siblings} layers or experts side by side", f"but {expected}"))
    _set_dtype(pairs, contents)
    if config is not None and not config.problems and not contents.problems:
        _check_config(config, contents)
    return contents


def _pair_up(
    header: Mapping[str, TensorInfo], contents: Contents
) -> tuple[dict[str, Pair], list[str]]:
    pairs: dict[str, Pair] = {}
    used: set[str] = set()
    for suffixes in (_LINEAR_KEYS, _EMBEDDING_KEYS):
        for key in header:
            ending = next((end for end in suffixes if key.endswith(end)), None)
            if ending is None or not key.startswith(PREFIX) or key in used:
                continue
            module = key.removeprefix(PREFIX).removesuffix(ending)
            key_a, key_b = (f"{PREFIX}{module}{end}" for end in suffixes)
            used |= {key_a, key_b}
            if key_a not in header or key_b not in header:
                missing = key_b if key_a in header else key_a
                problem = "missing but its partner needs it. Save the adapter again."
                contents.problems.append((missing, problem))
            elif module in pairs:
                problem = (
                    "both linear and embedding factors but one kind is expected. Save it again."
                )
                contents.problems.append((module, problem))
            else:
                pairs[module] = header[key_a], header[key_b]
    return pairs, [key for key in header if key not in used]


def _place_others(
    others: list[str],
    pairs: Mapping[str, Pair],
    config: PlainConfig | None,
    policy: str,
    contents: Contents,
) -> None:
    declared = config.modules_to_save if config else []
    whole: list[str] = []
    for key in others:
        path = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and path.removesuffix(".base_layer.weight") in pairs:
            # PEFT copies the frozen base of a LoRA embedding into the file; it is no change.
            contents.notes.append(f"{key}: a copy of the base weights, left out.")
        elif key.startswith(PREFIX) and is_saved(path, declared):
            whole.append(key)
        elif key.startswith(PREFIX) and path.endswith(_SAVED_EMBEDDINGS):
            whole.append(key)
            if policy == "refuse":
                problem = f"a whole layer but only LoRA factors are expected. {WHOLE}"
                contents.problems.append((key, problem))
        else:
            contents.problems.append((key, f"unknown but {_advice(key)}"))
    if whole and policy == "drop":
        contents.notes.append(f"modules_to_save: {_listed(whole)}: whole layers, left out.")
    contents.saved = () if policy == "drop" else tuple(sorted(whole))


def is_saved(path: str, names: Iterable[str]) -> bool:
    """Say whether a tensor is of a module that PEFT's `modules_to_save` selects, by its ending.

    `classifier` selects `pre_classifier` as well, and whatever is inside either.
    """
    parents = [path[:at] for at, char in enumerate(path) if char == "."]
    return any(parent.endswith(name) for name in names for parent in parents)


def _listed(keys: list[str]) -> str:
    names = sorted(key.removeprefix(PREFIX) for key in keys)
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 2 else ", ".join(names)


def _advice(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return f"only B A is expected, and DoRA is no B A. {FOLD}"
    factor = re.search(r"\.lora_(A|B|embedding_A|embedding_B)(\.\w+)?(\.weight)?$", key)
    if factor and not key.startswith(PREFIX):
        return f"names that begin with {PREFIX} are expected. Save the adapter with PEFT."
    expected = f"only {PREFIX}<module>.lora_A.weight and lora_B.weight are expected."
    if factor:
        return f"{expected} Take the adapter's name out of the key: save with save_pretrained."
    return f"{expected} Save the adapter with PEFT."


def _shape_problems(module: str, a: TensorInfo, b: TensorInfo) -> list[tuple[str, str]]:
    problems = []
    for key, tensor in ((f"{module}: A", a), (f"{module}: B", b)):
        if tensor.dtype not in DTYPES:
            expected = f"one of {', '.join(DTYPES)} is expected. Save the adapter unquantised."
            problems.append((key, f"{tensor.dtype} but {expected}"))
        if 0 in tensor.shape or not 2 <= len(tensor.shape) <= 5:
            expected = (
                "2 to 5 dimensions, none of them 0, are expected. Gather shards before saving."
            )
            problems.append((key, f"shape {short(tensor.shape)} but {expected}"))
        elif max(tensor.shape[0], math.prod(tensor.shape[1:])) > MAX_WIDTH:
            expected = f"at most {MAX_WIDTH} rows and columns are expected. Save it again."
            problems.append((key, f"shape {short(tensor.shape)} but {expected}"))
    if problems:
        return problems
    kernel = b.shape[2:]
    if len(a.shape) != len(b.shape) or any(size != 1 for size in kernel):
        expected = "(rank, d_in) and (d_out, rank) are expected. Save the adapter again."
        problems.append((module, f"A {short(a.shape)} and B {short(b.shape)} but {expected}"))
    elif a.shape[0] != b.shape[1]:
        expected = "equal ranks are expected. Grouped convolutions are not supported."
        ranks = f"A of rank {a.shape[0]} and B of rank {b.shape[1]}"
        problems.append((module, f"{ranks} but {expected}"))
    return problems


def _layout(module: str, a: TensorInfo, header: Mapping[str, TensorInfo]) -> str | None:
    if tensor_keys(module, EMBEDDING)[0] in header:
        return EMBEDDING
    return "conv:" + "x".join(map(str, a.shape[2:])) if len(a.shape) > 2 else None


def _set_dtype(pairs: Mapping[str, Pair], contents: Contents) -> None:
    names = sorted({tensor.dtype for pair in pairs.values() for tensor in pair} & set(DTYPES))
    if names:
        contents.dtype = DTYPES[names[0]]
    for name in names[1:]:
        contents.dtype = torch.promote_types(contents.dtype, DTYPES[name])
    if len(names) > 1:
        contents.notes.append(f"element types {', '.join(names)} are mixed.")


def _check_config(config: PlainConfig, contents: Contents) -> None:
    try:
        matched = {m: matched_path(m, contents.layouts.get(m)) for m in contents.shapes}
        ranks = config.ranks(dict.fromkeys(matched.values()))
        scalings, notes = config.scalings(ranks)
    except (ValueError, OverflowError) as error:
        problem = f"{error} but fewer are expected. Write the names out."
        contents.problems.append(("rank_pattern, alpha_pattern", problem))
        return
    contents.scaling = {module: scalings[path] for module, path in matched.items()}
    contents.notes += notes
    contents.problems += [
        (module, f"rank {rank} but r or rank_pattern say {ranks[matched[module]]}. {_OWN_CONFIG}")
        for module, (_, _, rank) in contents.shapes.items()
        if rank != ranks[matched[module]]
    ]
    plain = [m for m in contents.shapes if m.rpartition(".")[2] not in _TRANSPOSED_NAMES]
    if config.raw.get("fan_in_fan_out") and plain:
        contents.notes.append(
            f"fan_in_fan_out: true, but {plain[0]} seems to be a plain linear layer, for which "
            "PEFT ignores it."
        )
    _check_targets(config, contents)


def _check_targets(config: PlainConfig, contents: Contents) -> None:
    targets = config.raw.get("target_modules")
    modules = [m for m in contents.shapes if not is_expert(contents.layouts.get(m))]
    if isinstance(targets, list):
        selected = frozenset(targets)
        contents.problems += [
            (
                module,
                "not in target_modules, so PEFT would ignore it, but all tensors are expected to "
                f"count. {_OWN_CONFIG}",
            )
            for module in modules
            if not covered(module, selected)
        ]
    names = plain_names(config.raw)
    if names is None:
        return
    wrong, uneven = find_gaps(modules)
    advice = "Save the adapter again, or list full module paths in target_modules."
    for where, _, what in (line.partition(": ") for line in wrong):
        contents.problems.append((where, f"{what}. {advice}"))
    contents.notes += [f"{line}." for line in uneven]
    absent = unused(names, modules)
    if absent:
        others = f", nor have {len(absent) - 1} others" if absent[1:] else ""
        contents.notes.append(f"target_modules: {short(absent[0])} has no tensors{others}.")
