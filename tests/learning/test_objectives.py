"""Objectives: equal to their definitions, blind to what should not matter, scaled as they say."""

import pytest
import torch
from torch.nn import functional as F

from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import Batch
from icm_ray.errors import RecipeError
from icm_ray.learning.forward import observe
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives.distillation import Distillation
from icm_ray.learning.objectives.entropy import HeadEntropy
from icm_ray.learning.objectives.logits import entropy
from icm_ray.learning.objectives.module_inputs import Tokens
from icm_ray.learning.objectives.null_space_ratio import NullSpaceRatio
from icm_ray.learning.objectives.row_space_match import RowSpaceMatch
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.objectives.task_vector_match import TaskVectorMatch
from icm_ray.learning.targets import Targets
from icm_ray.linalg.subspace import null_space_ratio, row_space
from icm_ray.types import LoRAFactors

EVERYTHING = Targets("all", share=1.0)


@pytest.fixture
def watched(tiny, make_tasks):
    """Run base and expert over a task's batches: `(inputs, objective, per-batch values)`."""

    @torch.no_grad()
    def watch(objective, number: int = 0, labels: bool = False):
        inputs = make_tasks(labels=labels)[number]
        own = objective.of(inputs)
        values = []
        for batch in inputs.batches:
            seen = []
            for adapter in (None, inputs.adapter):
                with applied(tiny.model, adapter):
                    seen.append(observe(tiny.model, batch, own.modules, hidden=own.hidden))
            memory = own.remember(batch, seen[1], seen[0]) if own.compares else {}
            values.append((batch, seen[0], seen[1], memory))
        return inputs, own, values

    return watch


def mean_over(values, own, which: int) -> torch.Tensor:
    measured = [own.measure(v[0], v[which], v[3]) for v in values]
    return torch.stack([m[0] for m in measured]).sum(0) / sum(m[1] for m in measured)


def test_ratios_are_means_over_real_tokens(watched) -> None:
    inputs, own, values = watched(NullSpaceRatio(EVERYTHING))
    assert own.modules == tuple(inputs.adapter.modules)
    for number, path in enumerate(own.modules):
        z = torch.cat([base.inputs[path][batch.mask] for batch, base, _, _ in values])
        expected = null_space_ratio(z, row_space(inputs.adapter.modules[path].a)).mean()
        torch.testing.assert_close(mean_over(values, own, 1)[number], expected)


@pytest.mark.parametrize(
    ("a", "z", "ratio"),
    [
        ([2.0, 1.0], [1.0, 0.0], 0.4472),
        ([2.0, 1.0], [1.0, 2.0], 0.6),
        ([2.0, 1.0], [1.0, -2.0], 1.0),
        ([2.0, 1.0], [4.0, 2.0], 0.001),  # in the row space: the floor under the root
    ],
)
def test_ratios_of_two_dimensions(adapter_around, a, z, ratio: float) -> None:
    own = adapter_around("t", {"l.0.o_proj": LoRAFactors(torch.tensor([a]), torch.ones(2, 1))})
    batch = Batch(torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), torch.arange(1))
    objective = NullSpaceRatio().of(TaskInputs(own, [batch]))
    vector = torch.tensor([[z]], requires_grad=True)
    sums, count = objective.measure(batch, Seen({"l.0.o_proj": vector}), {})
    assert float(sums[0].detach()) / count == pytest.approx(ratio, abs=1e-4)
    gradient = torch.autograd.grad(sums.sum(), vector)[0]
    assert gradient.isfinite().all()


def test_random_inputs_lie_outside_as_theory_says(adapter_around) -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(8, 64, generator=draw)
    z = torch.randn(4, 500, 64, generator=draw)
    batch = Batch(torch.zeros(4, 500).long(), torch.ones(4, 500).bool(), torch.arange(4))

    def ratio(factors: LoRAFactors, inputs: torch.Tensor) -> float:
        own = adapter_around("t", {"l.0.o_proj": factors})
        objective = NullSpaceRatio().of(TaskInputs(own, [batch]))
        sums, count = objective.measure(batch, Seen({"l.0.o_proj": inputs}), {})
        return float(sums[0]) / count

    plain = ratio(LoRAFactors(a, torch.ones(2, 8)), z)
    assert plain**2 == pytest.approx(1 - 8 / 64, abs=5e-3)
    mixed = torch.randn(8, 8, generator=draw) @ a * 7
    assert ratio(LoRAFactors(mixed, torch.ones(2, 8)), z) == pytest.approx(plain, rel=1e-5)
    assert ratio(LoRAFactors(a, torch.ones(2, 8)), z * 1e3) == pytest.approx(plain, rel=1e-5)


def test_tokens_that_do_not_count(watched) -> None:
    for tokens in (Tokens(padding=True), Tokens(skip_first=True), Tokens()):
        inputs, own, values = watched(NullSpaceRatio(EVERYTHING, tokens))
        path = own.modules[-1]
        kept = []
        for batch, base, _, _ in values:
            mask = torch.ones_like(batch.mask) if tokens.padding else batch.mask.clone()
            if tokens.skip_first:
                mask[:, 0] = False
            kept.append(base.inputs[path][mask])
        q = row_space(inputs.adapter.modules[path].a)
        expected = null_space_ratio(torch.cat(kept), q).mean()
        torch.testing.assert_close(mean_over(values, own, 1)[-1], expected)


@pytest.mark.parametrize("against", ["expert", "gap"])
def test_row_space_match_is_its_formula(watched, against) -> None:
    inputs, own, values = watched(RowSpaceMatch(EVERYTHING, against=against))
    assert not mean_over(values, own, 2).any(), "an expert matches itself"
    energy = sum(memory["energy"] for *_, memory in values)
    measured = [own.measure(batch, base, memory) for batch, base, _, memory in values]
    assert [count for _, count in measured] == [float(v[0].mask.sum()) for v in values]
    error = sum(sums for sums, _ in measured)
    for number, path in enumerate(own.modules):
        q = row_space(inputs.adapter.modules[path].a)
        before, after = (
            torch.cat([seen[which].inputs[path][seen[0].mask] for seen in values]) @ q
            for which in (1, 2)
        )
        gap = (before - after).square().sum()
        whole = after.square().sum() if against == "expert" else gap
        torch.testing.assert_close(error[number], gap, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(energy[number], whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [NullSpaceRatio(EVERYTHING), RowSpaceMatch(EVERYTHING)])
def test_only_linear_layers_with_a_rank_have_a_row_space(make_adapter, objective) -> None:
    shapes = {"l.0.q": (4, 6), "l.1.q": (4, 6), "l.2.words": (4, 9)}
    ranks = {"l.0.q": 2, "l.1.q": 0, "l.2.words": 2}
    adapter = make_adapter("t", shapes=shapes, rank=ranks, layouts={"l.2.words": "embedding"})
    assert objective.of(TaskInputs(adapter, [])).modules == ("l.0.q",)


def test_the_default_looks_at_everything_in_the_last_block(make_tasks) -> None:
    own = RowSpaceMatch().of(make_tasks()[0])
    assert {path.split("layer.")[1][0] for path in own.modules} == {"1"}
    assert len(own.modules) == 3


@pytest.mark.parametrize("pooling", ["mean", "tokens"])
def test_task_vector_match_is_its_formula(watched, pooling) -> None:
    _, own, values = watched(TaskVectorMatch(pooling))
    assert not mean_over(values, own, 2).any(), "an expert matches itself"

    def states(which: int) -> torch.Tensor:
        if pooling == "tokens":
            return torch.cat([v[which].hidden[v[0].mask] for v in values])
        # One text at a time, so there is no padding at all.
        rows = [(v[which].hidden[i], v[0].mask[i]) for v in values for i in range(len(v[0].rows))]
        return torch.stack([hidden[mask].mean(0) for hidden, mask in rows])

    gap = (states(2) - states(1)).square().sum()
    torch.testing.assert_close(sum(v[3]["energy"][0] for v in values), gap)
    error = sum(own.measure(v[0], v[1], v[3])[0][0] for v in values)
    torch.testing.assert_close(error, gap)


@pytest.mark.parametrize("number", [0, 2])
def test_a_head_reads_some_of_a_task_vector(watched, number: int) -> None:
    inputs, own, values = watched(TaskVectorMatch(heads=True), number)
    gap = logits(inputs, values, 2) - logits(inputs, values, 1)
    if number == 0:  # classes: a shift of all logits is no difference
        gap = gap - gap.mean(1, keepdim=True)
    energy = sum(v[3]["energy"] for v in values)
    torch.testing.assert_close(energy[1], gap.square().sum(), rtol=1e-4, atol=1e-5)
    error = sum(own.measure(v[0], v[1], v[3])[0] for v in values)
    torch.testing.assert_close(error, energy)
    assert not mean_over(values, own, 2).any()


def test_without_a_head_the_state_is_all_there_is(adapters, make_tasks, watched) -> None:
    bare = TaskInputs(adapters[0], make_tasks()[0].batches)
    assert TaskVectorMatch(heads=True).of(bare).reads is None
    _, _, values = watched(TaskVectorMatch())
    assert all(len(v[3]["energy"]) == 1 for v in values)


def logits(inputs, values, which: int) -> torch.Tensor:
    features = torch.cat([v[which].pooled(v[0].mask) for v in values])
    return features @ inputs.head.weight.T + inputs.head.bias


def test_head_entropy_is_that_of_the_classes(watched, make_tasks) -> None:
    inputs, own, values = watched(HeadEntropy())
    expected = torch.distributions.Categorical(logits=logits(inputs, values, 1)).entropy().mean()
    torch.testing.assert_close(mean_over(values, own, 1)[0], expected)
    assert HeadEntropy().of(make_tasks()[2]) is None, "a regression has none"
    assert float(entropy(torch.zeros(1, 4))) == pytest.approx(1.3863, abs=1e-4)
    assert float(entropy(torch.tensor([[0.0, 1e4]]))) == 0.0


@pytest.mark.parametrize("number", [0, 2])
def test_distillation_follows_the_expert_s_answers(watched, number: int) -> None:
    inputs, own, values = watched(Distillation(), number)
    theirs, bases = logits(inputs, values, 2), logits(inputs, values, 1)
    if number == 0:
        expected = F.kl_div(bases.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    else:
        expected = (bases - theirs).square().mean()
    torch.testing.assert_close(mean_over(values, own, 1)[0], expected)
    torch.testing.assert_close(mean_over(values, own, 2)[0], torch.tensor(0.0))


@pytest.mark.parametrize("number", [0, 2])
def test_labels_go_with_their_rows(watched, number: int) -> None:
    inputs, own, values = watched(Supervised(), number, labels=True)
    targets = inputs.targets[torch.cat([v[0].rows for v in values])]
    answers = logits(inputs, values, 1)
    if number == 0:
        expected = F.cross_entropy(answers, targets.long())
    else:
        expected = F.mse_loss(answers[:, 0], targets)
    torch.testing.assert_close(mean_over(values, own, 1)[0], expected)


def test_objectives_that_have_nothing_to_say(make_tasks, adapters) -> None:
    bare = TaskInputs(adapters[0], make_tasks()[0].batches)
    assert Distillation().of(bare) is None
    assert Supervised().of(make_tasks()[0]) is None
    with pytest.raises(RecipeError, match="task 'code': has no head"):
        HeadEntropy().of(TaskInputs(adapters[0], bare.batches, kind="classification"))
