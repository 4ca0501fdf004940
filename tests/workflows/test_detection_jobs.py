"""Boxes through the jobs: a user's folder, experts, merges and the report, on a tiny DINOv2."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ray_samples import write_yaml

from icm_ray.config import PipelineRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.workflows.pipeline.run import run

# Said by Ray Data of itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
OWN_RAY = True
SIDE = 56
COLOURS = {"warm": ((220, 40, 40), (220, 200, 40)), "cold": ((40, 60, 220), (40, 200, 80))}
"""Two families of squares, each of two classes."""


def square(draw: np.random.Generator, picture: np.ndarray, colour: Any) -> list[int]:
    """Paint a square into a picture, and return its corners."""
    x, y = (int(place) for place in draw.integers(0, 28, 2))
    side = int(draw.integers(16, 27))
    picture[y : y + side, x : x + side] = colour
    return [x, y, x + side, y + side]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two detections, and one classification of the same pictures, on a random DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    folder, base = tmp_path_factory.mktemp("squares"), tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Dinov2Model(config).save_pretrained(base)
    draw, tasks = np.random.default_rng(0), {}
    for name, colours in COLOURS.items():
        rows, kinds = [], []
        for number in range(96):
            kind, file = number % 2, f"{name}{number}.png"
            picture = draw.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8)
            boxes = [] if number % 12 == 11 else [[*square(draw, picture, colours[kind]), kind]]
            Image.fromarray(picture).save(folder / file)
            rows.append(json.dumps({"image": file, "answer": boxes}))
            kinds.append(json.dumps({"image": file, "answer": kind}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        (folder / "kind.jsonl").write_text("\n".join(kinds))
        tasks[name] = {"kind": "detection", "classes": ["first", "second"]}
    tasks["kind"] = {"kind": "classification", "classes": ["first", "second"]}
    for task in tasks.values():
        task["splits"] = {"calibration": 16, "validation": 16, "test": 24}
    write_yaml(folder / "suite.yaml", {"base": str(base), "tasks": tasks})
    return folder


@pytest.mark.slow
def test_boxes_go_from_a_folder_to_the_report(suite: Path, tmp_path: Path) -> None:
    learned = ("distillation", "nsc", "atlas", "joint")
    said = {
        "name": "squares",
        "suite": str(suite),
        "output": str(tmp_path / "out"),
        "resources": {"workers": 2, "cpus_per_worker": 0.5},
        "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "training": {
            "steps": 120,
            "batch": 16,
            "lora_lr": 0.02,
            "head_lr": 0.02,
            "checkpoints": 2,
        },
        "realign_heads": True,
        "methods": [
            {"method": "soup"},
            {"method": "regmean"},
            {"method": "task_arithmetic", "grid": {"scale": [0.3, 0.6]}},
            *(
                {"method": name, "learn": {"optimisation": {"steps": 2, "batch": 4}}}
                for name in learned
            ),
        ],
    }
    recipe = load_recipe(PipelineRecipe, write_yaml(tmp_path / "recipe.yaml", said))
    scores = run(recipe, tmp_path / "out")["scores"]
    for row in ("soup", "regmean", *learned):
        assert scores[f"shared-seed0/{row}"]["mean"] is not None
    rows = pq.read_table(tmp_path / "out" / "report" / "results.parquet").to_pylist()
    tests = {
        (row["method"], row["task"]): row
        for row in rows
        if row["split"] == "test" and not row["tuned"]
    }
    for task in COLOURS:
        expert, base = (tests[name, task] for name in ("expert", "base"))
        assert expert["metric"] == "map50"
        assert expert["score"] > 0.3
        assert expert["score"] > base["score"]
        assert 0 < expert["map"] < expert["score"]
        assert expert["low"] <= expert["score"] <= expert["high"]
    assert "<small>map " in (tmp_path / "out" / "report" / "index.html").read_text()
