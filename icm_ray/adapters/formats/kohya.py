"""kohya's sd-scripts and AI-toolkit: `lora_unet_..._to_q.lora_down.weight`, `lora_up`, `alpha`.

The change is `alpha / rank * up @ down`; without an alpha it is `up @ down`. A module's name has
its dots written as underscores, which cannot be undone in general: a name is only read back where
it is made of the words of diffusers' models in one way, else the name in the file stays.
"""

from pathlib import Path

from icm_ray.adapters.formats.view import (
    View,
    by_ending,
    plain_config,
    ranks_of,
    read_alphas,
    sort_keys,
    stored_as_peft,
)
from icm_ray.adapters.header import TensorInfo

ENDINGS = {"A": ".lora_down.weight", "B": ".lora_up.weight", "alpha": ".alpha"}
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_transformer_": "transformer",
}
"""What a name starts with, and the component of a diffusers pipeline it stands for."""

_UNET = (
    "down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks "
    "attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_in "
    "conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2"
)
_TEXT = (
    "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection"
)
_TRANSFORMER = (
    "transformer_blocks single_transformer_blocks attn to_q to_k to_v to_out to_add_out add_q_proj "
    "add_k_proj add_v_proj ff ff_context net proj proj_mlp proj_out norm norm1 norm1_context "
    "norm_out linear linear_1 linear_2 context_embedder x_embedder time_text_embed "
    "guidance_embedder text_embedder timestep_embedder"
)
_WORDS = {
    "unet": frozenset(_UNET.split()),
    "text_encoder": frozenset(_TEXT.split()),
    "text_encoder_2": frozenset(_TEXT.split()),
    "transformer": frozenset(_TRANSFORMER.split()),
}
_LONGEST_WORD = 3
"""Underscores in the longest word of these models, plus one."""


def read_kohya(file: Path, header: dict[str, TensorInfo]) -> View:
    """Read a kohya file in PEFT's words.

    Raises:
        InputError: naming every tensor that is no factor or alpha of a plain LoRA.
    """
    modules = sort_keys(file, header, _names, "lora_down, lora_up and alpha")
    alphas = read_alphas(file, header, modules)
    infos, stored = stored_as_peft(file, header, modules)
    return View(
        format="kohya",
        file=file,
        config=plain_config(ranks_of(header, modules), alphas),
        header=infos,
        stored=stored,
    )


def _names(key: str) -> tuple[str, str] | None:
    parts = by_ending(key, ENDINGS)
    return parts and (module_path(parts[0]), parts[1])


def module_path(name: str) -> str:
    """Return a module's path in a diffusers pipeline, or `name` if it could be none or several."""
    for prefix, root in PREFIXES.items():
        if name.startswith(prefix):
            paths = _readings(name.removeprefix(prefix), _WORDS[root])
            return f"{root}.{paths[0]}" if len(paths) == 1 else name
    return name


def _readings(name: str, words: frozenset[str]) -> list[str]:
    """Return at most two ways to read `name` as words and numbers joined by underscores."""
    parts = name.split("_")
    ways: list[list[str]] = [[] for _ in parts] + [[""]]
    for start in reversed(range(len(parts))):
        for end in range(start + 1, min(start + _LONGEST_WORD, len(parts)) + 1):
            word = "_".join(parts[start:end])
            if word in words or (word.isdecimal() and end == start + 1):
                ways[start] += [f"{word}.{rest}" if rest else word for rest in ways[end]]
        ways[start] = ways[start][:2]
    return ways[0]


def mangled(module: str, *, two_encoders: bool) -> str | None:
    """Return kohya's name of a module, or None if its component has none.

    Args:
        module: A path such as `unet.mid_block...`, or a name that is kohya's already.
        two_encoders: Whether the adapter has a second text encoder; then the first is `te1`.
    """
    if module.startswith(tuple(PREFIXES)) and "." not in module:
        return module
    root, _, path = module.partition(".")
    names = {root: prefix for prefix, root in reversed(PREFIXES.items())}
    if root not in names or not path:
        return None
    prefix = "lora_te1_" if root == "text_encoder" and two_encoders else names[root]
    return prefix + path.replace(".", "_")
