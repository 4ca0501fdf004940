"""Training of experts: it learns, it repeats, and a killed run ends in the same bytes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from icm_ray.adapters import load_adapter, open_adapter
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.placing import Place
from icm_ray.config import ExpertSet, LoRARecipe, Training
from icm_ray.errors import RecipeError
from icm_ray.evaluation.heads import Head
from icm_ray.files import sha256_of_file
from icm_ray.finetuning.expert import ExpertJob, Lesson, TrainedExpert, losses_summary
from icm_ray.finetuning.training import STATE, train_experts
from icm_ray.finetuning.trajectory import FOLDER, checkpoints_of, read_trajectory
from icm_ray.suites.tasks import Examples, Task

WORD = Task("word", "classification", "accuracy", ("odd", "even"), 16, "nowhere", "none")
YEAR = Task("year", "regression", "r2", (), 16, "nowhere", "none")


def make_job(task: Task = WORD, *, init: str = "shared", seed: int = 0, **training) -> ExpertJob:
    values = {
        "steps": 8,
        "batch": 6,
        "checkpoints": 3,
        "save_every": 3,
        "lora_lr": 0.02,
        **training,
    }
    lora = LoRARecipe(rank=2, alpha=4, targets=["query", "value"])
    which = ExpertSet(init=init, seed=seed)
    return ExpertJob(task, lora, Training(**values), which, (task.name,))


@pytest.fixture
def examples(texts) -> Examples:
    targets = np.array([float(len(text.split()) % 2) for text in texts])
    return Examples(texts, targets, texts)


@pytest.fixture
def train(tiny_bert, examples, tmp_path: Path):
    """Return a function that trains on a fresh base: (job, folder of state, report) -> expert."""

    def call(job: ExpertJob, scratch: str = "scratch", report=None) -> TrainedExpert:
        start = Head(torch.zeros(job.task.outputs, 16), torch.zeros(job.task.outputs), 0.5, 2.0)
        if job.task.classes:
            start = Head(start.weight, start.bias)
        folder = tmp_path / scratch
        folder.mkdir(exist_ok=True)
        (expert,) = train_experts(
            load_base(tiny_bert), [Lesson(job, examples, start)], folder, report
        )
        return expert

    return call


def tensors(expert: TrainedExpert) -> dict[str, torch.Tensor]:
    named = {n: p.detach() for n, p in expert.model.named_parameters() if "lora_" in n}
    return {**named, "weight": expert.head.weight, "bias": expert.head.bias}


def same(one: TrainedExpert, two: TrainedExpert) -> bool:
    pairs = [(tensors(one)[name], tensors(two)[name]) for name in tensors(one)]
    return one.losses == two.losses and all(torch.equal(x, y) for x, y in pairs)


def digests(folder: Path, task: Task = WORD) -> dict[str, str]:
    return {p.name: sha256_of_file(p) for p in sorted((folder / task.name / FOLDER).iterdir())}


@pytest.mark.parametrize("task", [WORD, YEAR], ids=lambda task: task.name)
def test_the_loss_falls(train, task: Task) -> None:
    told: list[tuple[int, list[float]]] = []
    found = train(make_job(task, steps=60), report=lambda *step: told.append(step))
    ends = losses_summary(found.losses)
    assert ends["last_loss"] < 0.7 * ends["first_loss"]
    assert told == [(step, [loss]) for step, loss in enumerate(found.losses, start=1)]
    assert (found.head.mean, found.head.std) == ((0.0, 1.0) if task.classes else (0.5, 2.0))
    assert not found.head.weight.requires_grad


def test_a_base_in_bfloat16_trains_a_float_head(tiny_bert, examples, tmp_path: Path) -> None:
    base, start = (
        load_base(tiny_bert, Place(dtype="bfloat16")),
        Head(torch.zeros(2, 16), torch.zeros(2)),
    )
    (found,) = train_experts(base, [Lesson(make_job(steps=60), examples, start)], tmp_path)
    assert found.head.weight.dtype == torch.float32
    assert losses_summary(found.losses)["last_loss"] < losses_summary(found.losses)["first_loss"]


def test_training_repeats_and_depends_on_the_seed(train) -> None:
    one, two = train(make_job(), "one"), train(make_job(), "two")
    assert same(one, two)
    assert not same(one, train(make_job(seed=1), "three"))


@pytest.mark.parametrize("killed_after", [1, 3, 5, 8])
def test_a_killed_run_ends_in_the_same_bytes(train, tmp_path: Path, killed_after: int) -> None:
    whole = train(make_job(), "whole")

    def kill(step: int, _losses: list[float]) -> None:
        if step == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_job(), "killed", kill)
    steps: list[int] = []
    resumed = train(make_job(), "killed", lambda step, _losses: steps.append(step))
    assert steps == list(range(killed_after // 3 * 3 + 1, 9)), "only what was lost is repeated"
    assert same(resumed, whole)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "another rank", "no losses"])
def test_a_state_that_cannot_be_used_is_trained_again(train, tmp_path: Path, damage: str) -> None:
    whole = train(make_job(), "whole")
    folder = tmp_path / "damaged"
    if damage == "cut":
        folder.mkdir()
        content = (tmp_path / "whole" / STATE).read_bytes()
        (folder / STATE).write_bytes(content[: len(content) // 2])
    elif damage == "another rank":
        job = make_job()
        train(
            replace(job, lora=LoRARecipe(rank=3, targets=["query"])),
            "damaged",
        )
    else:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file({"x": torch.zeros(1)}, folder / STATE)
    assert same(train(make_job(), "damaged"), whole)


def test_a_loss_that_is_no_number_stops_and_names_task_and_step(train, tmp_path) -> None:
    """What blows up is found at the next step, and no broken state is left to resume from."""
    job = make_job(save_every=1, lora_lr=1e30)
    for _ in range(2):
        with pytest.raises(RecipeError, match=rf"{WORD.name} is no number at step [1-3]\..*Lower"):
            train(job, "lost")
    states = [load_file(path) for path in (tmp_path / "lost").glob("state*")]
    assert all(bool(t.isfinite().all()) for state in states for t in state.values())


def test_finished_runs_are_not_trained_again(train) -> None:
    job = make_job(steps=6)
    one = train(job)
    assert same(train(job, report=lambda *_: pytest.fail("no step is left")), one)


def a_of(expert: TrainedExpert) -> list[torch.Tensor]:
    return [p for n, p in expert.model.named_parameters() if "lora_A" in n]


@pytest.mark.parametrize(("init", "equal"), [("shared", True), ("own", False)])
def test_who_shares_the_start_of_a(train, init: str, equal: bool) -> None:
    # B is zero at first, so after one step only B has moved and A is still what it was.
    one = train(make_job(WORD, init=init, steps=1), "one")
    two = train(make_job(YEAR, init=init, steps=1), "two")
    assert all(torch.equal(x, y) for x, y in zip(a_of(one), a_of(two), strict=True)) == equal
    other_seed = train(make_job(WORD, init=init, steps=1, seed=1), "three")
    assert not torch.equal(a_of(one)[0], a_of(other_seed)[0])


def test_the_base_is_left_alone(tiny_bert, examples, tmp_path: Path) -> None:
    base = load_base(tiny_bert)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    start = Head(torch.zeros(2, 16), torch.zeros(2))
    state = torch.get_rng_state()
    (expert,) = train_experts(base, [Lesson(make_job(), examples, start)], tmp_path)
    after = expert.model.unload().state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(start.weight, torch.zeros(2, 16))
    assert not torch.equal(expert.head.weight, start.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_expert_computes_what_was_trained(train, tiny_bert, tmp_path: Path, dtype) -> None:
    expert = train(make_job())
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        expected = expert.model(input_ids=ids).last_hidden_state
    expert.save_adapter(tmp_path / "adapter", dtype, "tiny")
    assert not (tmp_path / "adapter" / "README.md").exists()
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    adapter = load_adapter(tmp_path / "adapter", "word")
    assert adapter.base_model == "tiny"
    base = load_base(tiny_bert)
    with torch.no_grad(), applied(base.model, adapter):
        found = base.model(input_ids=ids).last_hidden_state
    atol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


def test_the_last_checkpoint_is_the_expert(train, tmp_path: Path) -> None:
    from icm_ray.finetuning.trajectory import unflatten

    expert = train(make_job())
    table, layout = read_trajectory(tmp_path / "scratch" / WORD.name / FOLDER)
    assert table["step"].to_pylist() == [5, 6, 8]
    assert table["loss"].to_pylist() == [expert.losses[step - 1] for step in (5, 6, 8)]
    last = unflatten(np.array(table["adapter"][-1].as_py(), dtype=np.float32), layout)
    expert.save_adapter(tmp_path / "adapter", torch.float32, "tiny")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(last) == set(stored)
    assert all(torch.equal(last[name], stored[name]) for name in stored)


@pytest.mark.parametrize("rank", [2, 4])
def test_training_goes_on_from_an_adapter(train, tiny_bert, examples, tmp_path, rank: int) -> None:
    first = train(make_job(steps=60), "first")
    first.save_adapter(tmp_path / "start", torch.float32, "tiny")
    start = open_adapter(tmp_path / "start")
    lora = LoRARecipe(rank=rank, alpha=3 * rank, targets=["query", "value"])
    training = Training(steps=2, batch=8, checkpoints=2, trajectory="whole", train_examples=40)
    job = replace(make_job(), lora=lora, training=training)
    (tmp_path / "next").mkdir()
    (found,) = train_experts(
        load_base(tiny_bert), [Lesson(job, examples, first.head, start)], tmp_path / "next"
    )
    assert found.losses[0] < 0.7 * losses_summary(first.losses)["first_loss"]
    found.save_adapter(tmp_path / "found", torch.float32, "tiny")
    after = open_adapter(tmp_path / "found").load()
    before = next(checkpoints_of(after, tmp_path / "next" / WORD.name / FOLDER))[1]
    for module, factors in start.load().modules.items():
        change = factors.b @ factors.a
        assert before[module].a.shape[0] == rank
        torch.testing.assert_close(before[module].b @ before[module].a, change)
