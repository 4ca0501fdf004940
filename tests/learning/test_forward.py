"""The merged forward pass: equal to changed weights, ended early, clean when something fails."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from learning_samples import merged_factors
from torch import nn

from icm_ray.base_model.loading import find_module, load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.placing import Place
from icm_ray.base_model.readers import join
from icm_ray.errors import InputError
from icm_ray.learning.forward import merged, observe
from icm_ray.learning.parameters import Coefficients, CoreMatrices
from icm_ray.learning.terms import own_terms, summed, tsv_terms
from icm_ray.types import LoRAFactors

TARGETS = ("encoder.layer.0.attention.self.value", "encoder.layer.1.attention.output.dense")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def parameters(terms):
    return CoreMatrices(terms.with_residual(summed(tsv_terms(terms), 0.7)), 0.4)


@torch.no_grad()
def test_it_computes_what_the_merged_adapter_computes(tiny, make_tasks, parameters, adapter_around):
    adapter = adapter_around("merged", merged_factors(parameters))
    for batch in make_tasks()[0].batches:
        with merged(tiny.model, parameters.frames, parameters.cores()):
            ours = observe(tiny.model, batch, TARGETS, hidden=True)
        with applied(tiny.model, adapter):
            theirs = observe(tiny.model, batch, TARGETS, hidden=True)
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-5)
        for path in TARGETS:
            torch.testing.assert_close(ours.inputs[path], theirs.inputs[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Coefficients, CoreMatrices])
@torch.no_grad()
def test_embeddings_are_merged_too(tiny, make_adapter, make_tasks, adapter_around, kind) -> None:
    word = "embeddings.word_embeddings"
    given = [
        make_adapter(t, shapes={word: (16, 20)}, layouts={word: "embedding"}) for t in ("a", "b")
    ]
    parameters = kind(own_terms(given), 0.5)
    whole = adapter_around("m", merged_factors(parameters), layouts={word: "embedding"})
    batch = make_tasks()[0].batches[0]
    with merged(tiny.model, parameters.frames, parameters.cores()):
        ours = observe(tiny.model, batch, (), hidden=True).hidden
    with applied(tiny.model, whole):
        theirs = observe(tiny.model, batch, (), hidden=True).hidden
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_the_pass_ends_at_the_last_target(tiny, make_tasks) -> None:
    ran = []
    late = find_module(tiny.model, "encoder.layer.1.intermediate.dense")
    handle = late.register_forward_hook(lambda *_: ran.append(1))
    batch = make_tasks()[0].batches[0]
    try:
        short = observe(tiny.model, batch, TARGETS, hidden=False)
        assert not ran
        long = observe(tiny.model, batch, TARGETS, hidden=True)
        assert ran
    finally:
        handle.remove()
    assert short.hidden is None
    assert all(torch.equal(short.inputs[p], long.inputs[p]) for p in TARGETS)
    assert hooks(tiny.model) == 0


@pytest.mark.parametrize("hidden", [False, True])
def test_recomputed_blocks_give_the_same_gradients(tiny, make_tasks, parameters, hidden) -> None:
    batch = make_tasks()[0].batches[0]
    found = []
    for save in (False, True):
        with merged(tiny.model, parameters.frames, parameters.cores()):
            seen = observe(tiny.model, batch, TARGETS, hidden=hidden, save=save)
            value = sum(x.square().sum() for x in seen.inputs.values())
            value = value + (seen.hidden.square().sum() if hidden else 0)
            leaves = list(parameters.tensors().values())
            found.append(torch.autograd.grad(value, leaves, allow_unused=True))
    for plain, saved in zip(*found, strict=True):
        assert (plain is None) == (saved is None)
        if plain is not None:
            torch.testing.assert_close(saved, plain)
    assert "forward" not in vars(tiny.model.encoder.layer[0])


@torch.no_grad()
def test_several_tasks_in_one_pass_are_what_each_is_alone(tiny, make_tasks) -> None:
    batches = [task.batches[n] for n, task in enumerate(make_tasks())]
    whole = join(batches)
    assert len({batch.ids.shape[1] for batch in batches}) > 1, "some are padded"
    seen = observe(tiny.model, whole, TARGETS, hidden=True)
    for batch, part in zip(batches, seen.split(batches), strict=True):
        alone = observe(tiny.model, batch, TARGETS, hidden=True)
        pairs = [(part.inputs[p], alone.inputs[p]) for p in TARGETS]
        for ours, theirs in [*pairs, (part.hidden, alone.hidden)]:
            torch.testing.assert_close(ours[batch.mask], theirs[batch.mask], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            part.pooled(batch.mask), alone.pooled(batch.mask), rtol=1e-4, atol=1e-5
        )


def test_nothing_is_left_behind_after_an_error(tiny, terms, make_adapter, make_tasks) -> None:
    other = make_adapter("x", shapes={"encoder.layer.0.attention.self.query": (16, 9)})
    parameters = Coefficients(own_terms([other]), 1.0)
    with (
        pytest.raises(InputError, match=r"is \(16, 16\) but the adapters' delta is \(16, 9\)"),
        merged(tiny.model, parameters.frames, parameters.cores()),
    ):
        pass
    fine = Coefficients(terms, 1.0)
    batch = make_tasks()[0].batches[0]
    with (
        pytest.raises(InputError, match="module zzz"),
        merged(tiny.model, fine.frames, fine.cores()),
    ):
        observe(tiny.model, batch, ("zzz",), hidden=False, save=True)
    assert hooks(tiny.model) == 0
    assert "forward" not in vars(tiny.model.encoder.layer[0])


def test_half_precision_bases_run_in_their_dtype(tiny_bert, terms, make_tasks) -> None:
    from icm_ray.base_model.loading import load_base

    half = load_base(tiny_bert, Place(dtype="bfloat16"))
    parameters = Coefficients(terms, 0.4)
    with merged(half.model, parameters.frames, parameters.cores()):
        seen = observe(half.model, make_tasks()[0].batches[0], TARGETS, hidden=True)
        assert seen.hidden is not None
        assert seen.hidden.dtype == torch.bfloat16
        found = torch.autograd.grad(seen.hidden.float().sum(), list(parameters.leaves.values()))
    assert all(g.dtype == torch.float32 for g in found)


def test_a_rank_of_zero_changes_nothing(tiny, adapter_around, make_tasks) -> None:
    nothing = LoRAFactors(torch.zeros(0, 16), torch.zeros(16, 0))
    own = adapter_around("e", {"encoder.layer.0.attention.self.query": nothing})
    parameters = Coefficients(own_terms([own]), 1.0)
    batch = make_tasks()[0].batches[0]
    with torch.no_grad():
        plain = observe(tiny.model, batch, (), hidden=True).hidden
        with merged(tiny.model, parameters.frames, parameters.cores()):
            assert torch.equal(observe(tiny.model, batch, (), hidden=True).hidden, plain)


def test_blocks_of_a_spread_base_keep_what_moves_their_inputs(tiny_bert, make_tasks) -> None:
    model = load_base(tiny_bert).model
    block = model.get_submodule("encoder.layer.0")
    add_hook_to_module(block, AlignDevicesHook("cpu"))
    moved = block.forward
    observe(model, make_tasks()[0].batches[0], TARGETS, hidden=True, save=True)
    assert block.forward is moved
