"""Generated answers: decoded as without a cache, trained and learned from their tokens alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import T5Config, T5Model

from icm_ray.base_model import decoding
from icm_ray.base_model.decoding import greedy, readout_of
from icm_ray.base_model.loading import Base, load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.readers import Answered, by_length
from icm_ray.base_model.states import hidden_states, states_of
from icm_ray.config import OptimisationSpec
from icm_ray.errors import RecipeError
from icm_ray.evaluation.answers import answer_of
from icm_ray.learning.gradients import Learning, TaskGradients
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives.distillation import Distillation
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.parameters import Coefficients
from icm_ray.learning.tasks import LearnerData, Readable
from icm_ray.learning.terms import own_terms
from icm_ray.suites.tasks import Examples, Task
from icm_ray.types import LoRAFactors

END = 3
NEW = 5
TASK = Task("words", "generation", "exact_match", (), 16, "nowhere", "none", max_new_tokens=NEW)


@pytest.fixture(scope="module")
def base(tiny_llama) -> Base:
    return load_base(tiny_llama)


@pytest.fixture
def examples(texts) -> Examples:
    return Examples(
        texts[:10], np.full(10, np.nan), tuple(map(str, range(10))), answers=texts[10:20]
    )


def one_by_one(base: Base, prompt: list[int]) -> list[int]:
    """Return the greedy answer to one prompt, all of it read again for every token."""
    said: list[int] = []
    while len(said) < NEW and said[-1:] != [END]:
        logits = base.whole(input_ids=torch.tensor([prompt + said])).logits
        said.append(int(logits[0, -1].argmax()))
    return said


def test_answers_are_those_of_each_prompt_alone(base, texts):
    prompts = base.reader.read(texts, 16)
    batch = base.reader.batch(prompts, range(len(prompts)))
    together = greedy(base.model, readout_of(base), batch, NEW, END)
    assert together == [one_by_one(base, prompt) for prompt in prompts]
    assert len({tuple(answer) for answer in together}) > 5


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_what_reads_a_whole_text_first_says_no_tokens(tiny_bert, kind):
    base = load_base(tiny_bert)
    if kind == "t5":
        model = T5Model(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1))
        base = replace(base, model=model, whole=model)
    with pytest.raises(RecipeError, match=rf"base: {kind} reads a whole text before it says any"):
        readout_of(base)


def test_what_the_model_says_itself_is_a_perfect_answer(base, examples):
    prompts = base.reader.read(examples.texts, 16)
    said = [one_by_one(base, prompt) for prompt in prompts]
    own = base.tokenizer.batch_decode(said, skip_special_tokens=True)
    own[4] = "something else"
    told = Examples(examples.texts, examples.targets, examples.documents, answers=tuple(own))
    scores = answer_of(TASK).predict(base, None, told, TASK, size=3)
    assert scores.tolist() == [1.0] * 4 + [0.0] + [1.0] * 5


def nats_of_answers(base: Base, examples: Examples) -> list[torch.Tensor]:
    """Return each answer's tokens' negative log-likelihoods, one example at a time."""
    found = []
    prompts = base.tokenizer(list(examples.texts))["input_ids"]
    answers = base.tokenizer(list(examples.answers), add_special_tokens=False)["input_ids"]
    for prompt, answer in zip(prompts, answers, strict=True):
        told = [*answer[: NEW - 1], END]
        logits = base.whole(input_ids=torch.tensor([prompt + told])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(told) - 1)
        found.append(torch.stack([-logits[p, t] for p, t in zip(places, told, strict=True)]))
    return found


def test_training_sees_the_answer_s_tokens_alone(base, examples):
    answer = answer_of(TASK)
    rows = [7, 2, 5]
    batch = answer.batches(base, examples, TASK)(rows)
    (states,) = states_of(base.model, [batch])
    value = answer.loss(base, None, states, torch.zeros(3), TASK)
    nats = nats_of_answers(base, examples)
    torch.testing.assert_close(value, torch.cat([nats[row] for row in rows]).mean())


def test_supervised_learning_reads_answers_where_they_are_given(
    base, examples, make_adapter, tmp_path
):
    labelled = {"words": Readable(TASK, None, examples.labels)}
    data = LearnerData({"words": (examples.texts, 16)}, labelled)
    (inputs,) = data.batched([make_adapter("words")], base.reader, 4)
    assert sorted(row for batch in inputs.batches for row in batch.rows.tolist()) == list(range(10))
    objective = Supervised(readout_of(base)).of(inputs)
    total, count = 0.0, 0.0
    for batch in inputs.batches:
        assert isinstance(batch, Answered)
        with torch.no_grad():
            sums, tokens = objective.measure(batch, Seen({}, hidden_states(base.model, batch)), {})
        total, count = total + sums.sum(), count + tokens
    nats = torch.cat(nats_of_answers(base, examples))
    assert count == len(nats)
    torch.testing.assert_close(total / count, nats.mean())


def test_supervised_learning_is_silent_without_answers(base, make_adapter):
    inputs = TaskInputs(make_adapter("words"), [], kind="generation")
    assert Supervised(readout_of(base)).of(inputs) is None


MODULES = {f"layers.{i}.self_attn.q_proj": (16, 16) for i in (0, 1)}


@pytest.mark.parametrize("kind", ["generation", "language_modelling"])
def test_distillation_follows_what_the_expert_says(base, texts, make_adapter, kind):
    """Prompts: the expert's own answers, one by one. Texts: every token. Against whole logits."""
    adapter = make_adapter("words", shapes=MODULES, rank=2, spread=0.6)
    read = base.reader.read(texts[:7], 16)
    batches = [base.reader.batch(read, rows) for rows in by_length(read, 3)]
    longest = NEW if kind == "generation" else 0
    inputs = TaskInputs(adapter, batches, None, kind, max_new_tokens=longest)
    half = Coefficients(own_terms([adapter]), 0.5)
    objective = Distillation(readout_of(base), END)
    side = TaskGradients(
        base.model, Learning(half, objective, OptimisationSpec()), [inputs], covered=["words"]
    )
    told = side.start("words")
    assert told.base == pytest.approx([1.0])
    assert told.expert == pytest.approx([0.0], abs=1e-6)
    divergence = {0.0: 0.0, 0.5: 0.0}
    for ids in read:
        with torch.no_grad(), applied(base.model, adapter):
            said = one_by_one(base, ids)[:-1] if longest else []
            theirs = base.whole(input_ids=torch.tensor([ids + said])).logits[0].log_softmax(-1)
        shown = slice(len(ids) - 1, None) if longest else slice(None)
        for scale in divergence:
            scaled = replace(
                adapter,
                modules={m: LoRAFactors(f.a, f.b * scale) for m, f in adapter.modules.items()},
            )
            with torch.no_grad(), applied(base.model, scaled):
                own = base.whole(input_ids=torch.tensor([ids + said])).logits[0].log_softmax(-1)
            gaps = (theirs.exp() * (theirs - own)).sum(-1)
            divergence[scale] += float(gaps[shown].sum())
    assert told.start == pytest.approx([divergence[0.5] / divergence[0.0]], rel=1e-4)
    assert side.gradient(("words",), 0).gradients


def test_texts_are_scored_as_the_model_scores_them(base, texts, monkeypatch):
    monkeypatch.setattr(decoding, "TOKENS_AT_ONCE", 7)
    task = Task("novel", "language_modelling", "token_likelihood", (), 16, "nowhere", "none")
    told = Examples(texts[:6], np.full(6, np.nan), tuple("abcdef"))
    found = answer_of(task).predict(base, None, told, task, size=4)
    for row, ids in zip(found, base.reader.read(told.inputs, 16), strict=True):
        given = torch.tensor([ids])
        own = base.whole(input_ids=given, labels=given).loss
        assert row[:2].tolist() == [
            pytest.approx(float(own) * (len(ids) - 1), rel=1e-5),
            len(ids) - 1,
        ]
    batch = answer_of(task).batches(base, told, task)([4, 1])
    (states,) = states_of(base.model, [batch])
    value = answer_of(task).loss(base, None, states, torch.zeros(2), task)
    assert float(value) == pytest.approx(found[[4, 1], 0].sum() / found[[4, 1], 1].sum(), rel=1e-5)
