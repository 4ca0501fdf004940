"""Task vectors and ratios: equal to their definitions, computed by hand with PEFT's own forward."""

import warnings

import pytest
import torch

from icm_ray.adapters import load_adapter
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.states import features, make_batches, pad_batch, pooled, tokenize
from icm_ray.errors import InputError
from icm_ray.evidence.gather import gather
from icm_ray.linalg.subspace import null_space_ratio, row_space
from icm_ray.types import LoRAFactors


@pytest.fixture(scope="module")
def base(tiny_bert):
    return load_base(tiny_bert)


@pytest.fixture(scope="module")
def ids(base, texts) -> list[list[int]]:
    return tokenize(base.tokenizer, texts, 16)


@pytest.fixture(scope="module")
def trained(tiny_bert, tmp_path_factory):
    """An adapter as PEFT saves it, and PEFT's model with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ["query", "value", "word_embeddings", "pooler.dense"]
        model = get_peft_model(
            BertModel.from_pretrained(tiny_bert), LoraConfig(r=2, target_modules=names)
        ).eval()
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.4)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(str(folder))
        return load_adapter(folder, "task"), model


def mean_state(model, ids) -> torch.Tensor:
    """Equation 1 by hand: one text at a time, so there is no padding at all."""
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in ids]
    return torch.stack(states).mean(0)


def test_a_task_vector_is_the_difference_of_mean_states(base, trained, ids) -> None:
    adapter, model = trained
    found = gather(base.model, adapter, make_batches(ids, 5, 0))
    with model.disable_adapter():
        plain = mean_state(model, ids)
    expected = mean_state(model, ids) - plain
    assert expected.norm() > 0.1
    torch.testing.assert_close(found.task_vector, expected, rtol=1e-4, atol=1e-5)
    assert found.task_vector.dtype == torch.float32
    assert (found.task, found.fingerprint) == ("task", adapter.fingerprint)
    assert found.inputs == len(ids)


def test_a_task_vector_may_be_of_the_last_position(base, trained, ids) -> None:
    adapter, model = trained

    def last() -> torch.Tensor:
        with torch.no_grad():
            states = [model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
        return torch.stack(states).mean(0)

    found = gather(base.model, adapter, make_batches(ids, 5, 0), "last")
    with model.disable_adapter():
        plain = last()
    torch.testing.assert_close(found.task_vector, last() - plain, rtol=1e-4, atol=1e-5)
    assert found.expert_ratios == gather(base.model, adapter, make_batches(ids, 5, 0)).expert_ratios


def test_ratios_are_the_mean_over_tokens(base, trained, ids) -> None:
    adapter, model = trained
    found = gather(base.model, adapter, make_batches(ids, 5, 0))
    assert set(found.expert_ratios) == set(found.base_ratios) == set(adapter.modules)
    for ratios, on in ((found.expert_ratios, True), (found.base_ratios, False)):
        for path, factors in adapter.modules.items():
            seen = []
            module = model.base_model.model.get_submodule(path)
            handle = module.register_forward_pre_hook(
                lambda _m, given, seen=seen: seen.append(given[0])
            )
            with torch.no_grad():
                for row in ids:
                    if on:
                        model(input_ids=torch.tensor([row]))
                    else:
                        with model.disable_adapter():
                            model(input_ids=torch.tensor([row]))
            handle.remove()
            d_in = factors.shape[1]
            if "embeddings" in path:
                z = torch.nn.functional.one_hot(torch.cat(seen, 1)[0], d_in).float()
            else:
                z = torch.cat([given.reshape(-1, d_in) for given in seen])
            expected = null_space_ratio(z, row_space(factors.a)).double().mean()
            assert ratios[path] == pytest.approx(float(expected), rel=1e-5), path
            assert 0 < ratios[path] < 1


@pytest.mark.parametrize("size", [1, 3, 24])
def test_padding_does_not_matter(base, trained, ids, size: int) -> None:
    adapter, _ = trained
    one = gather(base.model, adapter, make_batches(ids, 5, 0))
    rows = [range(start, start + size) for start in range(0, 24, size)]
    batches = [pad_batch([ids[row] for row in some], list(some), 7) for some in rows]
    other = gather(base.model, adapter, batches)
    torch.testing.assert_close(other.task_vector, one.task_vector, rtol=1e-4, atol=1e-5)
    assert other.expert_ratios == pytest.approx(one.expert_ratios, rel=1e-5)
    assert other.base_ratios == pytest.approx(one.base_ratios, rel=1e-5)


def test_gathering_repeats_and_leaves_the_base_alone(base, trained, ids) -> None:
    adapter, _ = trained
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    batches = make_batches(ids, 5, 0)
    one, two = (gather(base.model, adapter, batches) for _ in range(2))
    assert torch.equal(one.task_vector, two.task_vector)
    assert one.expert_ratios == two.expert_ratios
    assert all(torch.equal(w, before[n]) for n, w in base.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def test_hooks_are_gone_when_the_adapter_does_not_fit(base, adapter_around, ids) -> None:
    fits = LoRAFactors(torch.ones(1, 16), torch.ones(16, 1))
    name = "encoder.layer.0.attention.self.query"
    adapter = adapter_around("x", {name: fits, "zzz": fits})
    with pytest.raises(InputError, match="module zzz: not in BertModel"):
        gather(base.model, adapter, make_batches(ids, 5, 0))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def test_modules_without_rank_have_no_ratio(base, adapter_around, ids) -> None:
    empty = LoRAFactors(torch.zeros(0, 16), torch.zeros(16, 0))
    adapter = adapter_around("x", {"encoder.layer.0.attention.self.query": empty})
    found = gather(base.model, adapter, make_batches(ids, 5, 0))
    assert found.expert_ratios == found.base_ratios == {}
    assert torch.equal(found.task_vector, torch.zeros(16))


def test_batches_hold_every_example_once_with_little_padding(ids) -> None:
    batches = make_batches(ids, 5, 0)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(24))
    for batch in batches:
        for row, tokens, mask in zip(batch.rows.tolist(), batch.ids, batch.mask, strict=True):
            assert tokens[mask].tolist() == ids[row]
            assert torch.equal(mask, mask.sort(descending=True).values)
    assert sum(int((~batch.mask).sum()) for batch in batches) <= 6
    again = make_batches(ids, 5, 0)
    assert all(torch.equal(x.ids, y.ids) for x, y in zip(batches, again, strict=True))


def test_features_come_back_in_their_order(base, ids) -> None:
    found = features(base.model, make_batches(ids, 5, 0))
    with torch.no_grad():
        alone = [pooled(base.model, pad_batch([row], [0], 0))[0] for row in ids]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_a_tokenizer_without_padding_will_do(ids) -> None:
    batch = pad_batch([ids[0], ids[4]], [0, 4], None)
    assert batch.ids[0][~batch.mask[0]].tolist() == [0] * (len(ids[4]) - len(ids[0]))


def test_texts_are_cut_and_empty_ones_are_refused(base) -> None:
    assert [len(row) for row in tokenize(base.tokenizer, ["the sun", "the " * 50], 8)] == [4, 8]
    with pytest.raises(InputError, match=r"texts: number 1 gives no token"):
        tokenize(lambda texts, **_: {"input_ids": [[1], [], []]}, ["a", "", ""], 8)
