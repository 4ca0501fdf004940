"""How to serve what was made: lines to copy, for vLLM and SGLang."""

from pathlib import Path


def serving_lines(model: Path, base: Path, adapter: Path, rank: int) -> list[str]:
    """Return the lines that serve a whole model, and those that serve its adapter beside the base.

    Args:
        model: Folder of the whole model.
        base: Folder of the base.
        adapter: Folder of the adapter.
        rank: What the server must hold, one of those that vLLM knows.
    """
    name = adapter.resolve().name
    return [
        "the whole model:",
        f"  vllm serve {model}",
        f"  python -m sglang.launch_server --model-path {model}",
        "or the adapter beside its base:",
        f"  vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={adapter}",
        f"  python -m sglang.launch_server --model-path {base} --enable-lora "
        f"--max-lora-rank {rank} --lora-paths {name}={adapter}",
    ]
