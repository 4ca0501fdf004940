"""MLX: `<module>.lora_a` is `(d_in, rank)`, `<module>.lora_b` is `(rank, d_out)`.

The layer adds `scale * (x @ lora_a @ lora_b)`, so PEFT's A and B are their transposes. The scale is
one number for all modules, in the `adapter_config.json` beside them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icm_ray.adapters.contents import EMBEDDING
from icm_ray.adapters.formats.view import View, by_ending, plain_config, sort_keys, stored_as_peft
from icm_ray.adapters.header import TensorInfo
from icm_ray.adapters.policy import CONFIG_FILE, MAX_CONFIG_BYTES, short
from icm_ray.adapters.raw_files import read_table
from icm_ray.errors import InputError

WEIGHTS_FILE = "adapters.safetensors"
ENDINGS = {"A": ".lora_a", "B": ".lora_b"}
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")
"""The layers of MLX's models that are embeddings; the file itself does not say."""


def read_mlx(file: Path, header: dict[str, TensorInfo]) -> View:
    """Read an MLX adapter in PEFT's words.

    Raises:
        InputError: naming every tensor that is no factor, or what of the config is no plain LoRA.
    """
    modules = sort_keys(
        file, header, lambda key: by_ending(key, ENDINGS), "MLX's lora_a and lora_b"
    )
    config_file = file.parent / CONFIG_FILE
    config = read_table(config_file, MAX_CONFIG_BYTES)
    problems = [
        f"{file}: {sides[side]}: shape {short(header[sides[side]].shape)} but MLX's "
        "(d_in, rank) and (rank, d_out) are expected. Experts in one tensor cannot be merged."
        for sides in modules.values()
        for side in "AB"
        if len(header[sides[side]].shape) != 2
    ] + [f"{config_file}: {line}" for line in _config_problems(config)]
    if problems:
        raise InputError(problems)
    embeddings = [module for module in modules if module.rpartition(".")[2] in EMBEDDINGS]
    infos, stored = stored_as_peft(
        file, header, modules, dict.fromkeys(embeddings, EMBEDDING), is_turned=True
    )
    ranks = {module: max(header[sides["A"]].shape[1], 1) for module, sides in modules.items()}
    scale = config["lora_parameters"]["scale"]
    return View(
        format="MLX",
        file=file,
        config=plain_config(ranks, {m: scale * r for m, r in ranks.items()}, _base(config)),
        header=infos,
        stored=stored,
        config_file=config_file,
    )


def _base(config: Mapping[str, Any]) -> str | None:
    return config["model"] if isinstance(config.get("model"), str) else None


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    kind = "dora" if config.get("use_dora") else config.get("fine_tune_type", "lora")
    if kind != "lora":
        return [
            f"fine_tune_type: {short(kind)} but lora is expected of an MLX adapter. "
            "Only LoRA can be merged."
        ]
    parameters = config.get("lora_parameters")
    numbers = parameters if isinstance(parameters, dict) else {}
    scale, alpha, rank = (numbers.get(name) for name in ("scale", "alpha", "rank"))
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e30:
        return [
            f"lora_parameters.scale: {short(scale)} but the number that MLX multiplies the change "
            "by is expected. Copy it from the training's settings."
        ]
    if alpha is not None and alpha != rank:
        return [
            f"lora_parameters.alpha: {short(alpha)} but none is expected: MLX's versions disagree "
            "on whether it counts. Set scale to the number that yours multiplied by (scale, or "
            "scale * alpha / rank), and remove alpha."
        ]
    return []
