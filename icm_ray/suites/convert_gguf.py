"""A language model out of a GGUF file: its weights, in float32, become a transformers folder.

transformers reads GGUF itself; what it gives is marked as quantised and cannot be saved, so the
same tensors are put into a plain model.
"""

import importlib.util
from pathlib import Path

from icm_ray.errors import InputError

UNSAVED = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")
"""What the reader of GGUF adds to a config that is not the plain model's."""


def convert_llama(source: Path, target: Path) -> None:
    """Write the Llama model of the one GGUF file in `source` as a model folder.

    Args:
        source: Folder with one `*.gguf`.
        target: Folder to fill with config, safetensors weights and tokenizer.

    Raises:
        InputError: gguf is not installed, or there is no such model.
    """
    files = sorted(source.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{source}: {len(files)} GGUF files but one is expected.")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"{files[0].name}: gguf is not installed but needed once, to convert the model. Run "
            "pip install 'icm-ray[lm]'."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    named = {"gguf_file": files[0].name, "local_files_only": True}
    try:
        read = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **named)
        tokenizer = AutoTokenizer.from_pretrained(source, **named)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{files[0].name}: not a readable GGUF model ({error}).") from None
    if read.config.model_type != "llama":
        raise InputError(f"{files[0].name}: {read.config.model_type} but llama is expected.")
    config = {n: v for n, v in read.config.to_dict().items() if n not in UNSAVED}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
