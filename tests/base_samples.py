"""Random two-layer models, small enough for every test."""

import warnings
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.5,
}


def save_bert(folder: Path, **config: Any) -> None:
    """Save a random BERT without a tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BertModel(BertConfig(**SIZES, **config)).save_pretrained(folder)


def save_llama(folder: Path, **config: Any) -> None:
    """Save a random Llama without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    more = {"num_key_value_heads": 1, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**SIZES, **more, **config)).save_pretrained(folder)
