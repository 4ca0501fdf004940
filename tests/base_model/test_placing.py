"""Where the parts of a base lie on a worker's GPUs, and that it computes the same there."""

import pytest
import torch
from base_samples import SIZES
from torch import nn

from icm_ray.base_model.decoding import greedy, readout_of
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.placing import Place, device_plan, is_offloaded
from icm_ray.base_model.states import features, make_batches, pad_batch, tokenize
from icm_ray.errors import InputError

LAYERS = 12


def plan_of(kind: str, gpus: int) -> tuple[nn.Module, dict[str, str]]:
    import transformers as hf

    sizes = {**SIZES, "num_hidden_layers": LAYERS, "vocab_size": 40}
    with torch.device("meta"):
        if kind == "t5":
            config = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=LAYERS)
            model = hf.T5ForConditionalGeneration(config)
        else:
            config = hf.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied")
            model = hf.LlamaForCausalLM(config)
    return model, device_plan(model, "cuda", gpus)


@pytest.mark.parametrize("gpus", [2, 3, 4])
@pytest.mark.parametrize("kind", ["tied", "own head", "t5"])
def test_every_weight_has_one_place_and_shares_are_even(kind, gpus) -> None:
    model, plan = plan_of(kind, gpus)
    bytes_on = dict.fromkeys((f"cuda:{number}" for number in range(gpus)), 0)
    seen: dict[nn.Parameter, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        (place,) = {where for path, where in plan.items() if f"{name}.".startswith(f"{path}.")}
        assert seen.setdefault(weight, place) == place, "tied weights lie together"
    for weight, place in seen.items():
        bytes_on[place] += weight.nbytes
    even = sum(bytes_on.values()) / gpus
    assert all(0.6 * even < size < 1.4 * even for size in bytes_on.values()), bytes_on


def test_blocks_are_whole_and_in_order() -> None:
    _, plan = plan_of("own head", 3)
    blocks = [plan[f"model.layers.{number}"] for number in range(LAYERS)]
    assert blocks == sorted(blocks)
    assert plan["model.embed_tokens"] == "cuda:0"
    assert plan["model.norm"] == plan["lm_head"] == "cuda:2"


def test_a_model_that_names_no_blocks_is_refused() -> None:
    model, _ = plan_of("tied", 2)
    model._no_split_modules = set()
    with pytest.raises(InputError, match=r"gpus_per_worker: 2 but LlamaForCausalLM does not say"):
        device_plan(model, "cuda", 2)


@pytest.fixture
def spread(accelerator, tiny_llama):
    """The tiny Llama over two GPUs."""
    kind = accelerator.several(2)
    with accelerator.on():
        base = load_base(tiny_llama, Place(device=kind, gpus=2))
    assert {str(p.device) for p in base.whole.parameters()} == {f"{kind}:0", f"{kind}:1"}
    return base


def test_states_and_answers_over_two_gpus(
    accelerator, spread, tiny_llama, texts, make_adapter
) -> None:
    here = load_base(tiny_llama)
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    shapes = {**dict.fromkeys(paths, (16, 16)), "lm_head": (20, 16)}
    adapter = make_adapter("code", shapes=shapes, spread=0.3)
    prompts = tokenize(here.tokenizer, texts[:6], 16)

    def run(base) -> tuple[torch.Tensor, list[list[int]]]:
        with applied(base.whole, adapter):
            states = features(base.model, make_batches(prompts, 3, 0))
            return states, greedy(base.model, readout_of(base), pad_batch(prompts, range(6), 0), 4)

    expected, answers = run(here)
    with accelerator.on():
        states, said = run(spread)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert said == answers


def test_blocks_that_stay_in_memory_come_to_the_device_one_at_a_time(
    accelerator, tiny_llama, texts, make_adapter
) -> None:
    here = load_base(tiny_llama)
    with accelerator.on():
        there = load_base(tiny_llama, Place(device=accelerator.name, offload=True))
    assert is_offloaded(there.model)
    assert not is_offloaded(here.model)
    blocks = there.model.layers

    def resident() -> int:
        """Return how many blocks have weights on the device."""
        home = torch.device("cpu")
        return sum(block.mlp.gate_proj.weight.device != home for block in blocks)

    assert resident() == 0
    seen: list[int] = []
    for layer in blocks:
        layer.mlp.act_fn.register_forward_hook(lambda *_: seen.append(resident()))
    adapter = make_adapter(
        "code", shapes={f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in (0, 1)}, spread=0.3
    )
    prompts = tokenize(here.tokenizer, texts[:6], 16)

    def run(base) -> torch.Tensor:
        with applied(base.whole, adapter):
            return features(base.model, make_batches(prompts, 3, 0))

    expected = run(here)
    with accelerator.on():
        torch.testing.assert_close(run(there), expected, rtol=1e-4, atol=1e-5)
    assert set(seen) == {1}
    assert resident() == 0
