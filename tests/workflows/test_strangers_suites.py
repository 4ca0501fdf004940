"""Three suites that are in no package, from plain PEFT to the report, as a stranger would go.

    pytest -n 0 -s tests/workflows/test_strangers_suites.py -m long

Chats on SmolLM2 with two adapters, pairs of texts on MiniLM with adapters that have a head of their
own, and texts without any label. What each printed is in docs/results/strangers.md.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_samples import ROOT, environment

from icm_ray.suites import SUITES, prepare_base

OWN_RAY = True
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
Batches = Iterator[dict[str, torch.Tensor]]


def train(model: Any, batches: Batches, folder: Path, **lora: Any) -> None:
    """Train one adapter as PEFT's own examples do."""
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(2)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**{**LORA, **lora}))
    optimiser = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-3)
    for batch in batches:
        adapted(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.save_pretrained(folder)
    torch.set_num_threads(1)


def run(*words: object) -> str:
    """Run `icm-ray` and return what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "icm_ray", *map(str, words)],
        cwd=ROOT,
        env=environment(ICM_RAY_CACHE=os.environ.get("ICM_RAY_CACHE", "")),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def told(name: str, root: Path, said: dict[str, str], seconds: float) -> dict[str, Any]:
    """Return, and print, the pipeline's scores of a proof and what it took."""
    results = json.loads((root / "out" / "results.json").read_text())
    assert results["status"] == "done"
    assert (root / "out" / "report" / "index.html").is_file()
    assert (root / "out" / "adapter" / "adapter_model.safetensors").is_file()
    report = json.loads((root / "out" / "report" / "results.json").read_text())
    print(f"\n=== {name}: {seconds:.0f} s")
    for command, lines in said.items():
        print(f"--- {command}\n{lines}")
    return {"results": results, "report": report}


def proven(name: str, root: Path, adapters: Sequence[Path], *changes: str) -> dict[str, Any]:
    """Go from `init` to the report; the user writes no file but the data."""
    started = time.monotonic()
    said = {"init": run("init", root / "data", *adapters)}
    assert sorted(path.name for path in (root / "data").glob("*.yaml")) == [
        "pipeline.yaml",
        "suite.yaml",
    ]
    recipe = root / "data" / "pipeline.yaml"
    order = ("-c", recipe, f"output={root / 'out'}", *changes)
    said["run"] = run("run", "pipeline", *order)
    lines = [line for line in said["run"].splitlines() if "\x1b" in line or "(pid=" in line]
    assert lines == [], "the terminal is calm"
    return told(name, root, said, time.monotonic() - started)


def chats(task: str, count: int) -> list[dict[str, Any]]:
    rows = SUITES["generation"].load(task, "train", count)
    return [
        {
            "messages": [
                {"role": "user", "content": str(asked)},
                {"role": "assistant", "content": answer},
            ]
        }
        for asked, answer in zip(rows.texts, rows.answers, strict=True)
    ]


def test_chats_on_a_language_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = prepare_base("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tasks = ("lemma", "date")
    for task in tasks:
        rows = chats(task, 900)
        write_rows(tmp_path / "data" / f"{task}.jsonl", rows[:40])

        def batches(rows: list[dict[str, Any]] = rows[300:]) -> Batches:
            for start in range(0, 120 * 4, 4):
                chosen = [row["messages"] for row in rows[start : start + 4]]
                texts = tokenizer.apply_chat_template(chosen, tokenize=False)
                batch = tokenizer(texts, return_tensors="pt", padding=True)
                labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                for own, messages in zip(labels, chosen, strict=True):
                    asked = tokenizer.apply_chat_template(
                        messages[:1], tokenize=False, add_generation_prompt=True
                    )
                    own[: len(tokenizer(asked)["input_ids"])] = -100
                yield {**batch, "labels": labels}

        model = AutoModelForCausalLM.from_pretrained(base)
        train(model, batches(), tmp_path / task, task_type="CAUSAL_LM")
    found = proven(
        "chats on SmolLM2-135M",
        tmp_path,
        [tmp_path / task for task in tasks],
        f"base={base}",
        "budget.minutes=6",
    )
    assert found


def pairs(make: Callable[[int], tuple[str, str, int]], count: int) -> list[dict[str, Any]]:
    rows = (make(i) for i in range(count))
    return [{"text": a, "text_pair": b, "label": label} for a, b, label in rows]


def pairs_of(task: str, count: int) -> list[dict[str, Any]]:
    """Return pairs of texts of one task, labelled by whether their answers are the same."""
    rows = SUITES["text"].load(task, "train", 1200)
    texts, targets = rows.texts, rows.targets
    if task == "year":  # which came first

        def make(i: int) -> tuple[str, str, int]:
            a, b = (2 * i) % len(texts), (2 * i + 1) % len(texts)
            return str(texts[a]), str(texts[b]), int(targets[a] < targets[b])
    else:
        by_class: dict[float, list[int]] = {}
        for i, target in enumerate(targets):
            by_class.setdefault(float(target), []).append(i)

        def make(i: int) -> tuple[str, str, int]:
            a, same = i % len(texts), i % 2
            others = by_class[float(targets[a])] if same else range(len(texts))
            b = others[(7 * i + 3) % len(others)]
            return str(texts[a]), str(texts[b]), int(targets[a] == targets[b])

    return pairs(make, count)


def test_pairs_of_texts_through_heads_of_their_own(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = prepare_base("minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tasks = ("supersense", "keyword", "year")
    for task in tasks:
        rows = pairs_of(task, 1000)
        write_rows(tmp_path / "data" / f"{task}.jsonl", rows[600:])

        def batches(rows: list[dict[str, Any]] = rows[:600]) -> Batches:
            for step in range(60):
                some = [rows[(16 * step + i) % len(rows)] for i in range(16)]
                texts, more = [r["text"] for r in some], [r["text_pair"] for r in some]
                batch = tokenizer(
                    texts, more, return_tensors="pt", padding=True, truncation=True, max_length=64
                )
                yield {**batch, "labels": torch.tensor([r["label"] for r in some])}

        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        train(
            model,
            batches(),
            tmp_path / task,
            task_type="SEQ_CLS",
            target_modules=["query", "key", "value"],
        )
    assert proven(
        "pairs of texts on MiniLM",
        tmp_path,
        [tmp_path / task for task in tasks],
        f"base={base}",
        "budget.minutes=2",
    )


def test_texts_without_labels(tmp_path: Path) -> None:
    experts = ROOT / "docs" / "results" / "lm" / "experts" / "shared-seed0"
    tasks = sorted(path.name for path in experts.iterdir())[:3]
    for task in tasks:
        rows = SUITES["lm"].load(task, "train", 60)
        write_rows(
            tmp_path / "data" / f"{task}.jsonl", [{"text": str(text)} for text in rows.texts]
        )
    assert proven(
        "texts without labels",
        tmp_path,
        [experts / task / "adapter" for task in tasks],
        f"base={prepare_base('smollm2-135m')}",
        "budget.minutes=2",
    )
