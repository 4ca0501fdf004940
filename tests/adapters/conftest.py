"""Adapter folders to read: made by PEFT on small random models, or written by hand."""

import json
import warnings

import pytest
import torch
from adapter_samples import an_adapter, changed, plain_config, plain_tensors, small_model
from safetensors.torch import save_file


@pytest.fixture
def make_peft(tmp_path):
    """Return a function that saves a random PEFT adapter and returns `(folder, model)`."""

    def make(kind, *, dtype=torch.float32, seed=0, folder="adapter", **options):
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(small_model(kind), LoraConfig(**options))
            torch.manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.to(dtype).save_pretrained(str(tmp_path / folder))
        return tmp_path / folder, model

    return make


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes a folder by hand: (config changes, tensor changes) -> Path.

    A tensor or config value of `...` removes the key.
    """

    def make(config=None, tensors=None, folder="adapter"):
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(changed(plain_config(), config)))
        save_file(changed(plain_tensors(), tensors), path / "adapter_model.safetensors")
        return path

    return make


@pytest.fixture
def adapter_of():
    return an_adapter
