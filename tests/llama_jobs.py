"""Jobs on a random Llama in bfloat16 of any size, with adapters and a suite of short texts."""

import json
from pathlib import Path
from typing import Any

import torch
from command_samples import save_lora
from ray_samples import write_yaml

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "vocab_size": 32,
}
TASKS = ("birds", "fish", "mosses", "stones")
TOKENS = 16
SPLITS = {"calibration": 2, "validation": 2, "test": 2}
SHORT = {"optimisation": {"steps": 1, "batch": 1}}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "evidence": ("evidence", {}),
    "nsc": ("learn", {"method": "nsc", "learn": SHORT}),
    "distillation": ("learn", {"method": "distillation", "learn": SHORT}),
    "scores": ("evaluate", {}),
}
"""Job and what its recipe says, by what comes of it."""


def save_base(folder: Path, tokenizer: Any, sizes: dict[str, int]) -> Path:
    """Save a random Llama in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**sizes)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def recipe_on(base: Path, root: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Return what every recipe says: base, adapters, inputs and two workers."""
    width = sizes["hidden_size"]
    narrow = width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    shapes = {
        f"model.layers.{layer}.self_attn.{leaf}_proj": (rows, width)
        for layer in range(sizes["num_hidden_layers"])
        for leaf, rows in (("q", width), ("v", narrow))
    }
    lora: dict[str, Any] = {"rank": 8, "size": 0.01, "shapes": shapes, "dtype": torch.bfloat16}
    lines = [json.dumps({"text": "abcdefghijklmnopqrstuvwxyz"[n : n + TOKENS]}) for n in range(8)]
    for task in TASKS:
        (root / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    own = {"kind": "language_modelling", "max_tokens": TOKENS}
    suite = {task: {**own, "splits": dict(SPLITS)} for task in TASKS}
    write_yaml(root / "suite.yaml", {"tasks": suite})
    folders = [save_lora(root / t, n, task_type="CAUSAL_LM", **lora) for n, t in enumerate(TASKS)]
    return {
        "base": str(base),
        "adapters": [{"name": folder.name, "path": str(folder)} for folder in folders],
        "data": {"suite": str(root)},
        "resources": {"workers": 2, "cpus_per_worker": 1},
    }


def of_stage(stage: str, shared: dict[str, Any], output: Path) -> tuple[str, dict[str, Any]]:
    """Return a stage's job and recipe."""
    job, changes = STAGES[stage]
    recipe = {**shared, **changes, "output": str(output)}
    if job == "evaluate":
        experts, suite = recipe["adapters"], recipe.pop("data")["suite"]
        recipe |= {"suite": suite, "experts": experts}
        recipe["adapters"] = [{**experts[0], "name": "again"}]
    return job, recipe
