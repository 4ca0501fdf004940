"""What counts as a plain LoRA: an adapter whose change of each module is exactly scaling * B A.

Everything else that PEFT can write into `adapter_config.json` is refused by name with the reason,
because merging only its A and B would be silently wrong.
"""

import json
import math
import re
import warnings as python_warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from icm_ray.adapters.patterns import (
    Number,
    compiles,
    match_all,
    may_run_for_ever,
    unsafe_keys,
)
from icm_ray.adapters.raw_files import parse_json, read_bytes, regular_size
from icm_ray.errors import InputError, masked
from icm_ray.types import SavedModulesPolicy

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 7_000_000
"""Room for the full paths of 50,000 modules, with a rank and an alpha of each."""
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}

NOT_PLAIN = {
    "use_dora": "DoRA rescales the base weights, so its change is not B A",
    "lora_bias": "it trains a bias that B A cannot hold",
    "target_parameters": "LoRA on fused parameters (mixture of experts) packs many B A into one",
    "trainable_token_indices": "it replaces rows of an embedding",
    "layer_replication": "it builds another model than the base",
    "use_qalora": "QA-LoRA pools the inputs before A",
    "alora_invocation_tokens": "activated LoRA applies B A to some tokens only",
    "monteclora_config": "MonteCLoRA samples its change",
    "use_bdlora": "block-diagonal LoRA stores its factors in blocks",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA cuts the base weights and puts a diagonal between B and A",
    "megatron_config": "Megatron layers may hold shards of A and B",
    "ensure_weight_tying": "it shares factors between layers, which a merged adapter cannot",
}
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
ONLY_FOR_TRAINING = (
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "velora_config",
    "runtime_config",
)
"""Keys about how the factors were first filled or trained: whatever they say, B A stays B A."""


def _is_number(value: object) -> bool:
    # 1e300 is finite, but nobody trains with it; the bound keeps alpha / r inside float32.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_table_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


_KINDS: dict[str, Callable[[object], bool]] = {
    "text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a positive integer": _is_positive_int,
    "a finite number": _is_number,
    "a list of names": _is_names,
    "a list of names or text": lambda value: isinstance(value, str) or _is_names(value),
    "true, false or text": lambda value: isinstance(value, bool | str),
    "a table of positive integers": _is_table_of(_is_positive_int),
    "a table of finite numbers": _is_table_of(_is_number),
    "a table of texts": _is_table_of(lambda value: value is None or isinstance(value, str)),
    "layer numbers": lambda value: all(
        isinstance(one, int) and not isinstance(one, bool)
        for one in (value if isinstance(value, list) else [value])
    ),
}
FIELDS = {
    **dict.fromkeys(("task_type", "peft_version", "base_model_name_or_path", "revision"), "text"),
    **dict.fromkeys(("inference_mode", "fan_in_fan_out", "use_rslora"), "true or false"),
    **dict.fromkeys(("peft_type", "bias"), "text"),
    "init_lora_weights": "true, false or text",
    "r": "a positive integer",
    "lora_alpha": "a finite number",
    "lora_dropout": "a finite number",
    "rank_pattern": "a table of positive integers",
    "alpha_pattern": "a table of finite numbers",
    "target_modules": "a list of names or text",
    "exclude_modules": "a list of names or text",
    "modules_to_save": "a list of names",
    "layers_to_transform": "layer numbers",
    "layers_pattern": "a list of names or text",
    "auto_mapping": "a table of texts",
}
NEVER_RUN = ("target_modules", "exclude_modules", "layers_pattern")
"""Keys that may hold a regular expression; the tensors decide instead."""
_NEVER_NULL = ("peft_type", "r", "lora_alpha")


@dataclass(frozen=True)
class PlainConfig:
    """A config that has passed every check.

    Attributes:
        raw: The JSON as it was read.
        warnings: What is legal but should not pass in silence.
    """

    raw: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def ranks(self, modules: Iterable[str]) -> Mapping[str, int]:
        """Return the rank that the config promises for every module."""
        default = self.raw.get("r", PEFT_DEFAULTS["r"])
        found, _ = match_all(self.raw.get("rank_pattern") or {}, modules, default)
        return {module: int(rank) for module, rank in found.items()}

    def scalings(self, ranks: Mapping[str, int]) -> tuple[Mapping[str, float], list[str]]:
        """Return alpha / rank of every module (rsLoRA: alpha / sqrt(rank)), and warnings."""
        default: Number = self.raw.get("lora_alpha", PEFT_DEFAULTS["lora_alpha"])
        alphas, torn = match_all(self.raw.get("alpha_pattern") or {}, ranks, default)
        root = math.sqrt if self.raw.get("use_rslora") else float
        scalings = {module: alphas[module] / root(rank) for module, rank in ranks.items()}
        if not torn:
            return scalings, []
        return scalings, [
            f"alpha_pattern: keys contradict each other for {len(torn)} modules, such as "
            f"{torn[0]}; the first one counts, as in PEFT, which sorts them when it saves."
        ]


def read_config(file: Path, saved_modules: SavedModulesPolicy) -> PlainConfig:
    """Read and check `adapter_config.json`.

    Raises:
        InputError: with every reason why this is no plain LoRA.
    """
    size = regular_size(file)
    if size > MAX_CONFIG_BYTES:
        raise InputError(
            f"{file}: {size} bytes but at most {MAX_CONFIG_BYTES} are expected. "
            "Save the adapter again with PEFT."
        )
    raw = parse_json(read_bytes(file, MAX_CONFIG_BYTES), str(file))
    if not isinstance(raw, dict):
        raise InputError(
            f"{file}: a {type(raw).__name__} but a JSON object is expected. Save the adapter again."
        )
    problems = [
        *_type_problems(raw),
        *_kind_problems(raw, saved_modules),
        *_pattern_problems(raw),
    ] or _peft_problems(raw)
    if problems:
        raise InputError(f"{file}: {problem}" for problem in problems)
    return PlainConfig(raw, tuple(f"{file}: {line}" for line in _warnings(raw, saved_modules)))


def short(value: object) -> str:
    """Return `value` as JSON, cut to a length that fits into a message."""
    text = masked(json.dumps(value, ensure_ascii=False))  # before an address loses its end
    return text if len(text) <= 60 else f"{text[:57]}..."


def known_revision(raw: Mapping[str, Any]) -> str | None:
    """Return the base's revision if it can be a branch, tag or commit."""
    revision = raw.get("revision")
    if not isinstance(revision, str) or ".." in revision:
        return None
    return revision if re.fullmatch(r"[\w./-]+", revision) else None


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _type_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, kind in FIELDS.items():
        value = raw.get(key)
        may_be_null = key not in _NEVER_NULL
        if key in raw and not (value is None and may_be_null) and not _KINDS[kind](value):
            problems.append(f"{key}: {short(value)} but {kind} is expected. Correct it.")
    return problems


def _kind_problems(raw: Mapping[str, Any], saved_modules: str) -> list[str]:
    problems = []
    kind, bias, init = (
        raw.get("peft_type"),
        raw.get("bias"),
        raw.get("init_lora_weights", True),
    )
    if kind != "LORA":
        problems.append(f"peft_type: {short(kind)} but LORA is expected. Only LoRA can be merged.")
    if bias not in (None, "none"):
        problems.append(
            f"bias: {short(bias)} but none is expected. Trained biases are no B A; "
            "train without them."
        )
    if isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE):
        problems.append(
            f"init_lora_weights: {short(init)} but a start that leaves the base weights alone is "
            "expected. Convert it with PEFT: path_initial_model_for_weight_conversion."
        )
    elif isinstance(init, str) and init.lower() not in PLAIN_INITS:
        problems.append(
            f"init_lora_weights: {short(init)} but true, false or one of "
            f"{', '.join(PLAIN_INITS)} is expected. Convert the adapter with PEFT."
        )
    for key, value in raw.items():
        if _is_empty(value) or key in FIELDS or key in ONLY_FOR_TRAINING:
            continue
        reason = NOT_PLAIN.get(key, "its meaning is not known here")
        problems.append(f"{key}: {short(value)} but nothing is expected: {reason}. Leave it out.")
    if saved_modules == "refuse" and not _is_empty(raw.get("modules_to_save")):
        problems.append(
            f"modules_to_save: {short(raw['modules_to_save'])} but none are expected. Whole layers "
            "are not merged: choose saved_modules 'drop', or 'keep' to carry them beside the merge."
        )
    return problems


def _pattern_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        table = raw.get(key)
        problems += [
            f"{key}: {reason} but names, '\\.', '.*', '[0-9]+' and '(a|b)' are expected. Write the "
            "module names out."
            for reason in unsafe_keys(table if isinstance(table, dict) else {})
        ]
    for key in NEVER_RUN:
        if isinstance(raw.get(key), str) and not compiles(raw[key]):
            problems.append(
                f"{key}: {short(raw[key])} but a valid regular expression is expected. Correct it."
            )
    return problems


def _peft_problems(raw: Mapping[str, Any]) -> list[str]:
    """Say what PEFT itself refuses; the import takes seconds, so it comes last."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            LoraConfig(**{key: value for key, value in raw.items() if key in known})
    except Exception as error:  # PEFT raises whatever its checks run into
        return [f"PEFT refuses it ({type(error).__name__}: {error}). Correct the config."]
    return []


def _warnings(raw: Mapping[str, Any], saved_modules: str) -> list[str]:
    lines = [
        f"{key}: missing, so PEFT's default {value} is used."
        for key, value in PEFT_DEFAULTS.items()
        if key not in raw
    ]
    base = raw.get("base_model_name_or_path") or ""
    if "://" in base or base.startswith(("/", ".", "~")) or "\\" in base:
        lines.append(
            f"base_model_name_or_path: {short(base)} is a path or address of another machine; "
            "it is compared as text and never opened."
        )
    if raw.get("revision") and not known_revision(raw):
        lines.append(
            f"revision: {short(raw['revision'])} is no branch, tag or commit. It is not used."
        )
    for key in NEVER_RUN:
        if isinstance(raw.get(key), str) and may_run_for_ever(raw[key]):
            lines.append(f"{key}: {short(raw[key])} could match for ever. It is not run.")
    if not _is_empty(raw.get("layers_to_transform")) or not _is_empty(raw.get("layers_pattern")):
        lines.append("layers_to_transform: the tensors decide which layers count.")
    mapping = raw.get("auto_mapping") or {}
    if mapping and not str(mapping.get("parent_library")).startswith("transformers."):
        lines.append(f"auto_mapping: {short(mapping)} names code that is never imported.")
    if saved_modules == "drop" and raw.get("modules_to_save"):
        lines.append(f"modules_to_save: {short(raw['modules_to_save'])} are left out.")
    return lines
