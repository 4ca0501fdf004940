"""Gram statistics of module inputs beside sums made by hand."""

import pytest
import torch

from icm_ray.base_model.loading import load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.evidence.grams import gather_grams

Q, K, OUT = (
    f"encoder.layer.1.attention.{name}" for name in ("self.query", "self.key", "output.dense")
)


@pytest.fixture(scope="module")
def bert(tiny_bert):
    return load_base(tiny_bert)


@pytest.fixture
def adapter(make_adapter):
    return make_adapter("law", shapes={Q: (16, 16), OUT: (16, 16)}, spread=0.2)


def inputs_of(bert, adapter, texts, module: str) -> torch.Tensor:
    """Every row of a module's input, one text at a time, so that nothing is padded."""
    rows = []
    hook = bert.model.get_submodule(module).register_forward_pre_hook(
        lambda _module, given: rows.append(given[0][0])
    )
    with torch.no_grad(), applied(bert.model, adapter):
        for ids in tokenize(bert.tokenizer, texts, 32):
            bert.model(input_ids=torch.tensor([ids]))
    hook.remove()
    return torch.cat(rows).double()


def test_grams_are_means_over_real_tokens_of_the_expert(bert, adapter, texts) -> None:
    ids = tokenize(bert.tokenizer, texts, 32)
    batches = make_batches(ids, 7, 0)
    assert any(not batch.mask.all() for batch in batches)
    found = gather_grams(bert.model, adapter, [K, OUT, Q, "embeddings.word_embeddings"], batches)
    assert found.shared == {Q: Q, K: Q, OUT: OUT}, "one Gram for one input, none for embeddings"
    assert found.inputs == len(texts)
    for module in (Q, OUT):
        x = inputs_of(bert, adapter, texts, module)
        assert found.rows[module] == len(x)
        expected = (x.T @ x / len(x)).float()
        torch.testing.assert_close(found.grams[module], expected, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_without_hooks(bert, adapter, texts) -> None:
    batches = make_batches(tokenize(bert.tokenizer, texts, 32), 8, 0)
    gather_grams(bert.model, adapter, [Q], batches)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in bert.model.modules())
