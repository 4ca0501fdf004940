"""What tests on Ray share: PEFT adapters, hashes, commands."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from base_samples import save_bert

from icm_ray.base_model.shared_base import share_base
from icm_ray.config import FinetuneRecipe, Resources
from icm_ray.distributed.session import Session
from icm_ray.files import RUN_FILE, sha256_of_file

ROOT = Path(__file__).resolve().parents[1]
VARIES = (RUN_FILE, "results.json")
"""Files with a clock, a host or a path in them, outside every comparison of bytes."""


def save_tiny_bert(folder: Path, rows: int = 30) -> Path:
    """Save a random two-layer BERT of width 16 whose tokenizer knows the letters.

    `rows` of its table of words make it as large as is asked for.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
    plain = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Split(Regex("."), "isolated")
    plain.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    tokenizer.save_pretrained(folder)
    save_bert(folder, vocab_size=rows, max_position_embeddings=128)
    return folder


def save_peft(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """Save a random PEFT adapter of a base; B is not zero as it would be at the start."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="FEATURE_EXTRACTION", **options)
        model = get_peft_model(AutoModel.from_pretrained(base), config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.peft_config["default"].base_model_name_or_path = "tiny"
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, without those that hold clocks and paths."""
    return {
        path.relative_to(folder).as_posix(): sha256_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(VARIES)
    }


def finetune_recipe(base: Path, output: Path, **changes: Any) -> FinetuneRecipe:
    """Return a recipe of two tasks, one of each kind, that trains for a moment."""
    plain = {
        "base": str(base),
        "tasks": ["depth", "supersense"],
        "lora": {"rank": 2, "alpha": 4, "targets": ["query", "value"]},
        "training": {"steps": 6, "batch": 8, "train_examples": 48, "checkpoints": 3},
        "sizes": {"calibration": 12, "validation": 24, "test": 24},
        "resources": {"workers": 2, "cpus_per_worker": 0.5},
        "output": str(output),
    }
    return FinetuneRecipe.model_validate({**plain, **changes})


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of every file, which tell an untouched file for sure."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    """Write a recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def merge_recipe(refs: list[tuple[str, Path]], output: Path, **more: Any) -> dict[str, Any]:
    """Return a merge recipe as plain data."""
    listed = [{"name": name, "path": str(path)} for name, path in refs]
    return {"adapters": listed, "method": "soup", "output": {"path": str(output)}, **more}


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a subprocess: no Ray of the caller's, warnings as usual."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "PYTEST_", "PYTHONWARNINGS"))
    }
    bin_folder = str(Path(sys.executable).parent)
    path = f"{bin_folder}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PYTHONPATH": str(ROOT), "PATH": path, **more}


def run(*words: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` from the root of the tree and return what it said."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def session_on(base: Path, seed: int = 0, **resources: Any) -> Session:
    """Return a session of the running Ray around a base."""
    return Session(Resources(**resources), share_base(base), seed)
