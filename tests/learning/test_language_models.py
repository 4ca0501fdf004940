"""Objectives of next tokens beside transformers' own losses, logits and greedy answers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from icm_ray.base_model.decoding import readout_of
from icm_ray.base_model.loading import Base, load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.config import OptimisationSpec
from icm_ray.learning.gradients import Learning, TaskGradients
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives.distillation import Distillation
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.objectives.token_entropy import TokenEntropy
from icm_ray.learning.parameters import Coefficients
from icm_ray.learning.terms import own_terms
from icm_ray.types import Adapter

LONGEST = 3


@pytest.fixture(scope="module")
def base(tiny_llama) -> Base:
    return load_base(tiny_llama)


@pytest.fixture(scope="module")
def expert(make_adapter) -> Adapter:
    paths = [f"layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qo"]
    return make_adapter("code", shapes=dict.fromkeys(paths, (16, 16)), spread=0.6)


@pytest.fixture
def side(base, expert, texts):
    """A merge of one adapter at half its size, and what an objective makes of its inputs."""

    def make(objective, kind: str, longest: int = 0) -> TaskGradients:
        batches = make_batches(tokenize(base.tokenizer, texts[:8], 16), 3, 0)
        inputs = TaskInputs(expert, batches, kind=kind, max_new_tokens=longest)
        parameters = Coefficients(own_terms([expert]), 0.5)
        learning = Learning(parameters, objective, OptimisationSpec())
        made = TaskGradients(base.model, learning, [inputs], covered=["code"])
        made.start("code")
        return made

    return make


@pytest.fixture
def halved(expert, adapter_around) -> Adapter:
    """The merge at its start, as an adapter."""
    parts = {m: type(f)(f.a, f.b * 0.5) for m, f in expert.modules.items()}
    return adapter_around("half", parts)


@torch.no_grad()
def logits(base: Base, adapter: Adapter | None, batch) -> Tensor:
    with applied(base.model, adapter):
        return base.whole(batch.ids, attention_mask=batch.mask.long()).logits.float()


def test_supervision_is_transformers_loss_of_all_texts(base, side, halved) -> None:
    made = side(Supervised(readout_of(base)), "language_modelling")
    nats, count = torch.zeros(()), 0
    for batch in made.tasks["code"].batches:
        labels = batch.ids.masked_fill(~batch.mask, -100)
        with torch.no_grad(), applied(base.model, halved):
            told = base.whole(batch.ids, attention_mask=batch.mask.long(), labels=labels).loss
        places = int(batch.mask[:, 1:].sum())
        nats, count = nats + told * places, count + places
    assert made._raw("code").tolist() == pytest.approx([float(nats / count)], rel=1e-5)


def divergence(own: Tensor, theirs: Tensor) -> Tensor:
    return F.kl_div(own.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)


def test_distillation_of_texts_compares_every_next_token(base, side, expert, halved) -> None:
    made = side(Distillation(readout_of(base)), "language_modelling")
    batches = made.tasks["code"].batches
    found = {
        name: torch.cat(
            [
                divergence(logits(base, adapter, b)[b.mask], logits(base, expert, b)[b.mask])
                for b in batches
            ]
        ).mean()
        for name, adapter in (("merge", halved), ("base", None))
    }
    expected = float(found["merge"] / found["base"])
    assert made.components("code") == pytest.approx([expected], rel=1e-4)


def answers(base: Base, adapter: Adapter | None, prompt: list[int]) -> list[int]:
    with torch.no_grad(), applied(base.model, adapter):
        whole = base.whole.generate(
            torch.tensor([prompt]), max_new_tokens=LONGEST, do_sample=False, pad_token_id=0
        )
    return whole[0, len(prompt) :].tolist()


def prompts(side: TaskGradients) -> list[list[int]]:
    batches = side.tasks["code"].batches
    return [ids[mask].tolist() for b in batches for ids, mask in zip(b.ids, b.mask, strict=True)]


def test_distillation_of_prompts_is_of_the_expert_s_own_answers(base, side, expert, texts) -> None:
    end = base.tokenizer.eos_token_id
    made = side(Distillation(readout_of(base), end), "generation", LONGEST)
    plain = prompts(side(Supervised(readout_of(base)), "language_modelling"))
    others = 0
    for prompt, taught in zip(plain, prompts(made), strict=True):
        answer = answers(base, expert, prompt)
        assert taught == [*prompt, *answer[:-1]]
        others += answer != answers(base, None, prompt)
    assert others, "the base would say something else"
    batch = made.tasks["code"].batches[0]
    own, theirs = (logits(base, adapter, batch)[batch.answers] for adapter in (None, expert))
    sums, count = made.objectives["code"].measure(
        batch, made._observe({"code": batch})["code"], made.memories["code"][0]
    )
    assert count == int(batch.answers.sum())
    torch.testing.assert_close(sums[0], divergence(own, theirs).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_entropy_is_that_of_the_merge_s_own_greedy_answers(base, side, halved, reduction) -> None:
    objective = TokenEntropy(readout_of(base), LONGEST, None, reduction)
    made = side(objective, "generation")
    expected = []
    for prompt in prompts(made):
        entropies = []
        for _ in range(LONGEST):
            with torch.no_grad(), applied(base.model, halved):
                last = base.whole(torch.tensor([prompt])).logits[0, -1].float()
            entropies.append(float(torch.distributions.Categorical(logits=last).entropy()))
            prompt = [*prompt, int(last.argmax())]
        expected.append(sum(entropies) / (LONGEST if reduction == "mean" else 1))
    assert made.components("code") == pytest.approx([sum(expected) / len(expected)], rel=1e-4)
