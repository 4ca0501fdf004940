"""A base of 1.1 billion parameters under two workers: its weights lie in memory once.

It takes minutes, most of them in bfloat16 products, which few processors are good at:

    pytest tests/workflows/test_large_base.py -m slow -s
"""

import time
from pathlib import Path
from typing import Any

import pytest
from llama_jobs import SMALL, STAGES, of_stage, recipe_on, save_base
from ray_samples import ROOT

from icm_ray.benchmarks.run import in_fresh_process
from icm_ray.command import run_recipe
from icm_ray.jobs import JOBS

OWN_RAY = True
LARGE = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
}
"""Of TinyLlama: 1.1e9 parameters."""
LIMIT = 1.3
"""What a base adds to all our processes together, over its bytes, activations included."""
SUMS = {"distillation": 2 * 4 * LARGE["hidden_size"] ** 2 * LARGE["num_hidden_layers"]}
"""What RegMean, its start, needs besides: each worker's sums of what q and v read, in float32."""


@pytest.fixture(scope="module")
def recipes(tiny_bert: Path, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What recipes say on this base, and on one under which only the libraries weigh."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(tiny_bert, eos_token="[SEP]"), {}
    for name, sizes in (("small", SMALL), ("large", LARGE)):
        root = tmp_path_factory.mktemp(name)
        found[name] = recipe_on(save_base(root / "base", tokenizer, sizes), root, sizes)
    return found


def weighed(job: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Run a job in this process and return its exit code, seconds and memory."""
    from icm_ray.distributed.memory import Sampler

    with Sampler() as sampler:
        started = time.monotonic()
        code = run_recipe(JOBS[job].kind, JOBS[job], recipe, [], debug=True)
    seconds = time.monotonic() - started
    return {"code": code, "seconds": seconds, "peak": sampler.peak, "workers": sampler.workers}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_its_weights_are_in_memory_once(stage, recipes, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small, large = (
        in_fresh_process(weighed, *of_stage(stage, recipes[name], tmp_path / name))
        for name in ("small", "large")
    )
    assert (small["code"], large["code"]) == (0, 0)
    assert (small["workers"], large["workers"]) == (2, 2)
    size = sum(file.stat().st_size for file in Path(recipes["large"]["base"]).glob("*.safetensors"))
    share = (large["peak"] - small["peak"] - SUMS.get(stage, 0)) / size
    print(
        f"\n{stage}: {large['seconds']:.0f} s, {large['peak'] / 1e6:.0f} MB in all, "
        f"{small['peak'] / 1e6:.0f} without a base: {share:.2f} of its {size / 1e6:.0f} MB"
    )
    assert share <= LIMIT
