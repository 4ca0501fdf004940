"""Keys of `adapter_config.json`: which change what an adapter computes, and which cannot."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from packaging.version import InvalidVersion, Version

FOLD = "Fold it into its base with PEFT's merge_and_unload, or train a plain LoRA."
ALONE = "Serve it by itself, or train a plain LoRA."

NOT_PLAIN = {
    "use_dora": ("DoRA rescales the base weights, so its change is not B A", FOLD),
    "lora_bias": ("it trains a bias that B A cannot hold", FOLD),
    "trainable_token_indices": ("it replaces rows of an embedding", FOLD),
    "layer_replication": (
        "it builds another model than the base, whose layers it names",
        FOLD,
    ),
    "use_qalora": ("QA-LoRA pools the inputs before A", ALONE),
    "alora_invocation_tokens": (
        "activated LoRA applies B A to some tokens only, a merge would to all",
        ALONE,
    ),
    "monteclora_config": ("MonteCLoRA samples its change", ALONE),
    "use_bdlora": ("block-diagonal LoRA stores its factors in blocks", ALONE),
    "arrow_config": ("Arrow routes between several adapters", ALONE),
    "kasa_config": ("KaSA cuts the base weights and puts a diagonal between B and A", FOLD),
    "megatron_config": (
        "Megatron layers may hold shards of A and B",
        "Gather the shards and save the adapter with PEFT.",
    ),
    "ensure_weight_tying": (
        "it shares factors between layers, which a merged adapter cannot",
        FOLD,
    ),
    "enable_lora": (
        "LoRA on parts of a fused layer (PEFT before 0.3) interleaves its factors",
        "Fold it into its base with the release that wrote it, or train a plain LoRA.",
    ),
    "use_mora": ("MoRA puts a square matrix in the place of B A", ALONE),
    "mora_type": ("MoRA puts a square matrix in the place of B A", ALONE),
    "num_experts": ("a mixture of LoRA experts routes between several B A", ALONE),
    "lora_nums": ("a mixture of LoRA experts routes between several B A", ALONE),
}
"""Keys that make a change other than scaling * B A: what they mean, and which way is right."""

TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types for which PEFT cannot load a file that lacks the task's head."""

TASK_TYPES = (*TASKS_WITH_HEADS, "SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION")
"""Task types that PEFT knows. Said here, because importing PEFT takes seconds."""

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

OF_OTHER_TOOLS = (
    "merge_weights",
    "is_trainable",
    "gradient_checkpointing",
    "use_gradient_checkpointing",
    "use_unsloth",
    "load_in_4bit",
    "load_in_8bit",
    "quantization_config",
    "datasets",
    "tags",
)
"""Switches and lists that other tools are known to leave there and that change no B A."""

_SWITCHES = ("use_", "enable_", "trust_")


def judged(
    raw: Mapping[str, Any], known: Iterable[str]
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Return what is wrong with keys that hold something, and which others are ignored.

    PEFT ignores keys it does not have, so a number or text under such a key changes nothing. A
    switch, a table or a list may have meant another forward pass to the tool that wrote it, and a
    key of a newer PEFT may mean one to PEFT.

    Args:
        raw: The config.
        known: Keys whose meaning is checked elsewhere.

    Returns:
        `(meaning, way on)` by refused key, and the names of ignored keys.
    """
    expected = {*known, *ONLY_FOR_TRAINING}
    refused: dict[str, tuple[str, str]] = {}
    ignored: list[str] = []
    for key, value in raw.items():
        if value is None or value is False or value in ("", [], {}) or key in expected:
            continue
        if key in NOT_PLAIN:
            refused[key] = NOT_PLAIN[key]
        elif key in OF_OTHER_TOOLS:
            ignored.append(key)
        elif _is_of_newer_peft(key, raw):
            refused[key] = (
                "a key of a newer PEFT, whose meaning is not known here",
                "Update icm_ray; until then serve the adapter by itself.",
            )
        elif value is True or isinstance(value, list | dict) or key.startswith(_SWITCHES):
            refused[key] = (
                "its meaning is not known here, and no release of PEFT has it",
                "Save the adapter as a plain LoRA with the tool that wrote it.",
            )
        else:
            ignored.append(key)
    return refused, ignored


def model_class(raw: Mapping[str, Any]) -> str | None:
    """Return the class of transformers that PEFT noted for an adapter without a task type."""
    mapping = raw.get("auto_mapping") or {}
    name, library = (str(mapping.get(key)) for key in ("base_model_class", "parent_library"))
    is_plain = library.startswith("transformers.") and re.fullmatch(r"[A-Za-z_]\w*", name)
    return name if is_plain else None


def _is_of_newer_peft(key: str, raw: Mapping[str, Any]) -> bool:
    """Say whether PEFT has the key, here or in the newer release that wrote the file."""
    from peft import LoraConfig

    if key in {field.name for field in fields(LoraConfig)}:
        return True
    try:
        return Version(str(raw.get("peft_version"))) > Version(version("peft"))
    except InvalidVersion:
        return False
