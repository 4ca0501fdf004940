"""diffusers, and AI-toolkit for newer models: `unet.` or `transformer.`, in one of four spellings.

Without alphas the change is `B @ A`; else alpha over rank of it. Files that diffusers saved with
their PEFT configs carry these as metadata, one for each component of the pipeline.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icm_ray.adapters.formats.view import (
    View,
    plain_config,
    ranks_of,
    read_alphas,
    sort_keys,
    stored_as_peft,
)
from icm_ray.adapters.header import TensorInfo, open_tensors
from icm_ray.adapters.policy import check_config
from icm_ray.adapters.raw_files import parse_json
from icm_ray.errors import InputError

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
ROOTS = r"(?:unet|transformer(?:_\d)?|text_encoder(?:_\d)?|diffusion_model)"
METADATA = "lora_adapter_metadata"
ENDINGS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
_SPELLINGS = re.compile(
    rf"(?P<root>{ROOTS})\.(?P<path>.+?)(?:"
    r"(?P<old>_lora)\.(?P<a>down|up)\.weight"
    r"|\.lora\.(?P<b>down|up)\.weight"
    r"|\.lora_linear_layer\.(?P<c>down|up)\.weight"
    r"|\.lora_(?P<d>[AB])\.weight"
    r"|\.(?P<e>alpha))"
)
_SIDES = {"down": "A", "up": "B"}
_OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What the attention processors of old called the layers of a text encoder."""


def read_diffusers(file: Path, header: dict[str, TensorInfo]) -> View:
    """Read a file that a diffusers pipeline loads, in PEFT's words.

    Raises:
        InputError: naming every tensor that is no factor or alpha of a plain LoRA, or what of the
            saved configs is no plain LoRA.
    """
    modules = sort_keys(file, header, _names, "LoRA factors of a pipeline's components")
    ranks = ranks_of(header, modules)
    alphas = read_alphas(file, header, modules)
    saved = _saved_alphas(file, ranks)
    if alphas and saved:
        raise InputError(
            f"{file}: alphas both as tensors and in {METADATA} but one kind is expected. "
            "Save the adapter again."
        )
    infos, stored = stored_as_peft(file, header, modules)
    return View(
        format="diffusers",
        file=file,
        config=plain_config(ranks, alphas or saved),
        header=infos,
        stored=stored,
    )


def _names(key: str) -> tuple[str, str] | None:
    parts = _SPELLINGS.fullmatch(key)
    if parts is None:
        return None
    side = next(parts[name] for name in "abcde" if parts[name])
    path = parts["path"].replace(".processor.", ".")
    if parts["old"]:
        parent, _, leaf = path.rpartition(".")
        is_text = parts["root"].startswith("text_encoder")
        leaf = _OLD_NAMES.get(leaf, leaf) if is_text else "to_out.0" if leaf == "to_out" else leaf
        path = f"{parent}.{leaf}" if parent else leaf
    return f"{parts['root']}.{path}", _SIDES.get(side, side)


def _saved_alphas(file: Path, ranks: Mapping[str, int]) -> dict[str, float]:
    """Return alphas that give the scaling of the PEFT configs in the metadata, where there are any.

    A rank-stabilised component's alpha is turned into the plain one of the same scaling.
    """
    with open_tensors(file) as handle:
        text = (handle.metadata() or {}).get(METADATA)
    if text is None:
        return {}
    where = f"{file}: {METADATA}"
    table = parse_json(text.encode(), where)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        root, _, name = key.partition(".")
        configs.setdefault(root, {"peft_type": "LORA"})[name] = value
    alphas: dict[str, float] = {}
    for root, raw in configs.items():
        own = {m.removeprefix(f"{root}."): r for m, r in ranks.items() if m.startswith(f"{root}.")}
        config = check_config(raw, f"{where}: {root}", "refuse")
        if config.problems:
            raise InputError(config.problems)
        scalings, _ = config.scalings(own)
        alphas |= {f"{root}.{module}": scalings[module] * own[module] for module in own}
    return alphas
