"""Images through everything a merge needs: experts, evidence, Grams, objectives, scores.

Two tasks ask for one answer an image and two for one a patch, at two sizes, on a tiny DINOv2, and
one for a box around the lightest patch.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from icm_ray.base_model.loading import Base, find_module, load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import batches_of
from icm_ray.config import ExpertSet, LoRARecipe, OptimisationSpec, Training
from icm_ray.errors import InputError, RecipeError
from icm_ray.evaluation.answers import head_features, headed
from icm_ray.evaluation.detection import assigned, box_loss, check_size, grid_of
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.probe import fit_probe
from icm_ray.evaluation.scoring import TaskData, evaluate
from icm_ray.evidence.gather import gather
from icm_ray.evidence.grams import gather_grams
from icm_ray.finetuning.expert import ExpertJob, Lesson
from icm_ray.finetuning.training import train_experts
from icm_ray.learning.forward import observe
from icm_ray.learning.gradients import Learning, TaskGradients
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import covered_tasks
from icm_ray.learning.objectives.distillation import Distillation
from icm_ray.learning.objectives.entropy import HeadEntropy
from icm_ray.learning.objectives.row_space_match import RowSpaceMatch
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.objectives.task_vector_match import TaskVectorMatch
from icm_ray.learning.parameters import Coefficients
from icm_ray.learning.terms import own_terms
from icm_ray.suites.tasks import Examples, Task, of_patches

COUNT = 16
QUERY = "encoder.layer.1.attention.q_proj"
PATHS = {f"encoder.layer.{i}.attention.{p}_proj": (16, 16) for i in (0, 1) for p in "qvo"}


def task_of(kind: str) -> Task:
    metrics = {"dense_classification": "miou", "classification": "accuracy", "detection": "map50"}
    metric = metrics.get(kind, "r2")
    classes = ("dark", "light") if "classification" in kind or kind == "detection" else ()
    return Task(kind, kind, metric, classes, 0, "nowhere", "none")


TASKS = {
    kind: task_of(kind)
    for kind in (
        "classification",
        "regression",
        "dense_classification",
        "dense_regression",
        "detection",
    )
}


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer DINOv2 of width 16."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("tiny-dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(dino: Path) -> Base:
    return load_base(dino)


def examples_of(task: Task) -> Examples:
    """Images of random grey patches; targets say how light the patches, or the image, are."""
    across = 3 if of_patches(task.kind) else 2
    draw = np.random.default_rng(across)
    light = draw.uniform(0, 1, (COUNT, across, across))
    images = np.rint(255 * np.kron(light, np.ones((14, 14)))).astype(np.uint8)
    targets = light.reshape(COUNT, -1) if across == 3 else light.mean((1, 2))
    if task.kind == "detection":
        y, x = np.divmod(targets.argmax(1), 3)
        corners = 14.0 * np.stack([x, y, x + 1, y + 1, np.full(COUNT, 1 / 14)], 1)
        targets = corners[:, None]
    elif task.classes:
        targets = (targets > 0.5).astype(np.float64)
    names = tuple(map(str, range(COUNT)))
    return Examples((), targets, names, images=np.repeat(images[..., None], 3, -1))


def probe_of(base: Base, task: Task) -> Head:
    examples = examples_of(task)
    read = (head_features(base, examples, task, 5), headed(task).labels(base, examples, task))
    return fit_probe(task, read, read)


def lesson(task: Task) -> Lesson:
    lora = LoRARecipe(rank=2, alpha=4, targets=["q_proj", "v_proj"])
    training = Training(steps=30, batch=8, lora_lr=0.02, head_lr=0.02, checkpoints=2)
    scale = (0.0, 1.0) if task.classes else (0.5, 0.3)
    start = Head(torch.zeros(task.outputs, 16), torch.zeros(task.outputs), *scale)
    job = ExpertJob(task, lora, training, ExpertSet(), tuple(TASKS))
    return Lesson(job, examples_of(task), start)


def test_experts_learn_together_and_are_scored(base: Base, dino: Path, tmp_path: Path) -> None:
    """Images of two sizes take two passes."""
    lessons = [lesson(task) for task in TASKS.values()]
    experts = train_experts(load_base(dino), lessons, tmp_path)
    for task, own, expert in zip(TASKS.values(), lessons, experts, strict=True):
        assert np.mean(expert.losses[-5:]) < 0.9 * np.mean(expert.losses[:3])
        assert expert.head is not None
        data = {"it": TaskData(task, own.train, expert.head)}
        scored = evaluate(base, None, data, batch=5)["it"]
        if task.kind == "detection":
            assert scored.predictions.shape[1] % 6 == 0
        else:
            assert scored.predictions.shape == own.train.targets.shape
        assert scored.score.low <= scored.score.value <= scored.score.high
        assert ("rmse" in scored.score.details) == (task.kind == "dense_regression")


@pytest.mark.parametrize("kind", ["dense_classification", "dense_regression"])
def test_dense_heads_read_each_patch_where_it_is(base: Base, kind: str) -> None:
    examples = examples_of(TASKS[kind])
    features = head_features(base, examples, TASKS[kind], 5)
    assert features.shape == (COUNT * 9, 16)
    pixels = base.reader.batch(base.reader.read(examples.inputs, 0), [3]).data
    with torch.no_grad():
        states = base.model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(features[27:36], states[0, 1:], rtol=1e-4, atol=1e-5)


def test_evidence_and_grams_are_over_every_token_of_every_image(base: Base, make_adapter) -> None:
    adapter = make_adapter("letters", shapes=PATHS, spread=0.2)
    batches = batches_of(base.reader, examples_of(TASKS["dense_regression"]).inputs, 0, 5)
    evidence = gather(base.model, adapter, batches)
    assert evidence.inputs == COUNT
    assert evidence.task_vector.norm() > 0
    assert set(evidence.expert_ratios) == set(PATHS)
    rows: list[torch.Tensor] = []
    hook = find_module(base.model, QUERY).register_forward_pre_hook(
        lambda _module, given: rows.append(given[0].flatten(0, 1))
    )
    with torch.no_grad(), applied(base.model, adapter):
        for batch in batches:
            base.model(pixel_values=batch.data)
    hook.remove()
    x = torch.cat(rows).double()
    assert len(x) == COUNT * 10
    gram = gather_grams(base.model, adapter, [QUERY], batches)
    found = next(iter(gram.grams.values())).square()
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def tasks(base: Base, make_adapter) -> list[TaskInputs]:
    made = []
    for kind, task in TASKS.items():
        examples, head = examples_of(task), probe_of(base, task)
        targets = torch.tensor((examples.targets - head.mean) / head.std).float()
        batches = batches_of(base.reader, examples.inputs, 0, 4)
        if kind == "detection":
            targets = assigned(targets, grid_of(batches[0]))
        adapter = make_adapter(kind, shapes=PATHS, spread=0.3)
        made.append(TaskInputs(adapter, batches, head, kind, targets))
    return made


OBJECTIVES = {
    "row space": RowSpaceMatch(),
    "task vector": TaskVectorMatch(),
    "heads": TaskVectorMatch(heads=True),
    "entropy": HeadEntropy(),
    "distillation": Distillation(),
    "labels": Supervised(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_images_of_two_sizes_share_a_step(base: Base, tasks, name: str) -> None:
    adapters = [task.adapter for task in tasks]
    parameters = Coefficients(own_terms(adapters), 0.4)
    learning = Learning(parameters, OBJECTIVES[name], OptimisationSpec(reduction="sum"))
    side = TaskGradients(base.model, learning, tasks, covered=[task.name for task in tasks])
    for task in side.tasks:
        side.start(task)
    classes = {"classification", "dense_classification"}
    assert set(side.tasks) == (classes if name == "entropy" else set(TASKS))
    together = side.gradient(tuple(side.tasks), 0)
    alone = [side.gradient((task,), 0) for task in side.tasks]
    for path, gradient in together.gradients.items():
        parts = [part.gradients[path] for part in alone if path in part.gradients]
        torch.testing.assert_close(gradient, sum(parts), rtol=1e-3, atol=1e-5)
    for part in alone:
        for task, loss in part.losses.items():
            assert together.losses[task] == pytest.approx(loss, rel=1e-4)


def test_entropy_of_boxes_alone_is_refused_in_one_line(tasks) -> None:
    boxes = [task for task in tasks if task.kind == "detection"]
    assert covered_tasks(tasks, HeadEntropy()) == ("classification", "dense_classification")
    with pytest.raises(RecipeError, match="HeadEntropy says nothing about any of the tasks"):
        covered_tasks(boxes, HeadEntropy())


def test_boxes_of_images_that_the_base_would_cut_are_refused(base: Base) -> None:
    task = TASKS["detection"]
    whole = examples_of(task)
    batch = base.reader.batch(base.reader.read(whole.inputs, 0), [0])
    assert whole.images is not None
    with pytest.raises(InputError, match="detection: images of 40 x 42 but the base reads 42 x 42"):
        check_size(task.name, whole.images[:, :, :40], batch)
    check_size(task.name, whole.images, batch)


@pytest.mark.parametrize("kind", ["dense_classification", "detection"])
def test_dense_labels_are_judged_patch_by_patch(base: Base, tasks, kind: str) -> None:
    task = next(task for task in tasks if task.name == kind)
    objective = Supervised().of(task)
    assert objective is not None
    side = TaskGradients(
        base.model,
        Learning(Coefficients(own_terms([task.adapter]), 1.0), Supervised(), OptimisationSpec()),
        [task],
        covered=[task.name],
    )
    side.scales[task.name] = torch.ones(1)
    side.memories[task.name] = [{} for _ in task.batches]
    found = side.components(task.name)[0]
    with torch.no_grad(), applied(base.model, task.adapter):
        states = head_features(base, examples_of(TASKS[task.name]), TASKS[task.name], 4)
    assert task.head is not None
    assert task.targets is not None
    logits = states @ task.head.weight.T + task.head.bias
    if kind == "detection":
        expected = box_loss(logits, task.targets.flatten(0, 1)).mean()
    else:
        expected = torch.nn.functional.cross_entropy(logits, task.targets.flatten().long())
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", TASKS)
def test_task_vectors_are_compared_where_the_head_reads(base: Base, tasks, kind: str) -> None:
    task = next(task for task in tasks if task.name == kind)
    head = Head(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
    own = TaskVectorMatch(heads=True).of(replace(task, head=head))
    adapters, found = {"base": None, "expert": task.adapter}, {}
    for name, adapter in adapters.items():
        with torch.no_grad(), applied(base.model, adapter):
            found[name] = head_features(base, examples_of(TASKS[kind]), TASKS[kind], 4)
            seen = observe(base.model, task.batches[0], (), hidden=True)
            if name == "base":
                before = seen
    memory = dict(own.remember(task.batches[0], seen, before))
    sums, count = own.measure(task.batches[0], before, memory)
    rows = torch.isin(torch.arange(COUNT), task.batches[0].rows)
    gaps = (found["base"] - found["expert"]).unflatten(0, (COUNT, -1))[rows].flatten(0, 1)
    assert count == len(gaps) == 4 * (9 if of_patches(kind) else 1)
    reads = gaps @ head.weight.T
    if "classification" in kind:  # a shift of all logits is no difference
        reads = reads - reads.mean(1, keepdim=True)
    expected = torch.stack([gaps.square().sum(), reads.square().sum()])
    torch.testing.assert_close(sums, expected, rtol=1e-3, atol=1e-5)
