"""What counts as a plain LoRA: an adapter whose change of each module is exactly scaling * B A.

Everything else that PEFT can write into `adapter_config.json` is refused by name with the reason,
because merging only its A and B would be silently wrong.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.adapters.config_keys import FOLD, TASK_TYPES, judged, model_class
from icm_ray.adapters.patterns import (
    Number,
    compiles,
    match_all,
    may_run_for_ever,
    unsafe_keys,
)
from icm_ray.errors import masked
from icm_ray.kinds import SavedModulesPolicy

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 7_000_000
"""Room for the full paths of 50,000 modules, with a rank and an alpha of each."""
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}

HEADS = ("score", "classifier")
"""Layers that PEFT saves of every sequence classification: the task's head."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")


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
    "target_parameters": "a list of names",
    "layers_to_transform": "layer numbers",
    "layers_pattern": "a list of names or text",
    "auto_mapping": "a table of texts",
}
WHOLE = (
    "Whole layers are not merged: set modules_to_save: mean, keep or drop in the recipe "
    "(saved_modules in Python)."
)
NEVER_RUN = ("target_modules", "exclude_modules", "layers_pattern")
"""Keys that may hold a regular expression; the tensors decide instead."""
_NEVER_NULL = ("peft_type", "r", "lora_alpha")


@dataclass(frozen=True)
class PlainConfig:
    """A config, and every reason why it is no plain LoRA's.

    Attributes:
        raw: The JSON as it was read.
        warnings: What is legal but should not pass in silence.
        problems: Why it is refused; nothing but `modules_to_save` can be relied on then.
    """

    raw: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def modules_to_save(self) -> list[str]:
        """Endings of the paths of modules that were trained whole, as PEFT matches them."""
        names = self.raw.get("modules_to_save")
        return names if isinstance(names, list) and _is_names(names) else []

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


def check_config(
    raw: Mapping[str, Any], file: Path | str, saved_modules: SavedModulesPolicy
) -> PlainConfig:
    """Check the contents of an `adapter_config.json`; `file` names them in its problems."""
    refused, ignored = judged(raw, FIELDS)
    problems = [
        *_type_problems(raw),
        *_kind_problems(raw, saved_modules),
        *(
            f"{key}: {short(raw[key])} but nothing is expected: {meaning}. {way}"
            for key, (meaning, way) in refused.items()
        ),
        *_pattern_problems(raw),
        *_layer_problems(raw),
    ]
    if problems:
        return PlainConfig(raw, problems=tuple(f"{file}: {line}" for line in problems))
    return PlainConfig(raw, tuple(_warnings(raw, ignored)))


def has_heads_alone(raw: Mapping[str, Any]) -> bool:
    """Say whether the full layers that a config names are heads and nothing else."""
    names = raw.get("modules_to_save")
    return isinstance(names, list) and bool(names) and all(name in HEADS for name in names)


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
    task = raw.get("task_type")
    if isinstance(task, str) and task not in TASK_TYPES:
        problems.append(
            f"task_type: {short(task)} but one of {', '.join(TASK_TYPES)} is expected, or PEFT "
            "refuses it. Correct it."
        )
    if bias not in (None, "none"):
        problems.append(
            f"bias: {short(bias)} but none is expected: trained biases are no B A. {FOLD}"
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
    if saved_modules == "refuse" and not _is_empty(raw.get("modules_to_save")):
        problems.append(
            f"modules_to_save: {short(raw['modules_to_save'])} but none are expected. {WHOLE}"
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


def _layer_problems(raw: Mapping[str, Any]) -> list[str]:
    """Say which ways of naming layers PEFT refuses together."""
    problems = []
    for key in ("layers_to_transform", "layers_pattern"):
        if isinstance(raw.get("target_modules"), str) and raw.get(key) is not None:
            problems.append(
                f"{key}: {short(raw[key])} but nothing is expected: PEFT refuses it beside a "
                "pattern in target_modules. Leave it out."
            )
    if raw.get("layers_pattern") and raw.get("layers_to_transform") is None:
        problems.append(
            "layers_to_transform: missing but layer numbers are expected: PEFT refuses "
            "layers_pattern without them. Leave both out."
        )
    return problems


def _warnings(raw: Mapping[str, Any], ignored: Sequence[str]) -> list[str]:
    lines = [
        f"{key}: missing, so PEFT's default {value} is used."
        for key, value in PEFT_DEFAULTS.items()
        if key not in raw
    ]
    if ignored:
        lines.append(
            f"{', '.join(ignored)}: no key that changes what PEFT computes. It is not used."
        )
    lines += _alpha_warnings(raw)
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
    mapping = raw.get("auto_mapping")
    if mapping and not model_class(raw):
        lines.append(f"auto_mapping: {short(mapping)} names code that is never imported.")
    return lines


def _alpha_warnings(raw: Mapping[str, Any]) -> list[str]:
    alphas = {"lora_alpha": raw.get("lora_alpha", PEFT_DEFAULTS["lora_alpha"])}
    alphas |= {f"alpha_pattern: {key}": n for key, n in (raw.get("alpha_pattern") or {}).items()}
    return [
        f"{key}: {alpha}, so the change is subtracted."
        if alpha < 0
        else f"{key}: 0, so the adapter changes nothing there and adds nothing to a merge."
        for key, alpha in alphas.items()
        if alpha <= 0
    ]
