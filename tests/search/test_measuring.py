"""What a trial is worth: the same merges and losses as everywhere else, on a base held once."""

import numpy as np
import pytest
import torch
from learning_samples import rebuilt

from icm_ray.adapters import fingerprint_of
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.states import batches_of
from icm_ray.config import SearchRow
from icm_ray.errors import RecipeError
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.scoring import TaskData, evaluate
from icm_ray.evidence.gather import gather
from icm_ray.fusion.data import samples_of
from icm_ray.fusion.serial import Checkpoints, fusion_spec_of, train_fusion
from icm_ray.learning.learner import learn
from icm_ray.learning.recipes import plan_of, spec_of
from icm_ray.learning.tasks import LearnerData, Readable
from icm_ray.merging.merge import merge
from icm_ray.search.measuring import Material, Measurer, Wanted
from icm_ray.search.spaces import Setting, space_of
from icm_ray.search.starting import starts_of
from icm_ray.suites.tasks import Examples, Task

PARTS = ("query", "value")
MODULES = {f"encoder.layer.{i}.attention.self.{part}": (16, 16) for i in (0, 1) for part in PARTS}
TASKS = ("code", "law")
LEARN = {"optimisation": {"steps": 6, "lr": 0.05, "batch": 4}, "start": {"value": 0.4}}


@pytest.fixture(scope="module")
def adapters(make_adapter):
    return [make_adapter(name, shapes=MODULES, rank=2, spread=0.4) for name in TASKS]


@pytest.fixture(scope="module")
def measurer(tiny_bert, adapters, texts):
    base = load_base(tiny_bert)
    inputs = {name: (texts[8 * i : 8 * i + 8], 16) for i, name in enumerate(TASKS)}
    scored, readable = {}, {}
    for number, name in enumerate(TASKS):
        task = Task(name, "classification", "accuracy", ("x", "y", "z"), 16, "", "")
        draw = torch.Generator().manual_seed(number)
        head = Head(torch.randn(3, 16, generator=draw), torch.zeros(3))
        targets = np.arange(12.0) % 3
        readable[name] = Readable(task, head)
        scored[name] = TaskData(task, Examples(texts[:12], targets, texts[:12]), head)
    expert = {
        a.name: evaluate(base, a, {a.name: scored[a.name]})[a.name].predictions for a in adapters
    }
    nobody = {t: s.predictions for t, s in evaluate(base, None, scored).items()}
    references = {"expert": expert, "base": nobody}
    vectors = {
        a.name: gather(base.model, a, batches_of(base.reader, *inputs[a.name], 4)).task_vector
        for a in adapters
    }
    samples = [sample for adapter in adapters for sample in samples_of(adapter, None)]
    material = Material(
        adapters,
        LearnerData(inputs, readable),
        scored=scored,
        references=references,
        checkpoints=Checkpoints(samples, vectors),
        input_batch=4,
    )
    return Measurer(base, material)


AIMS = ("validation_mean", "null_space_ratio", "row_space_match", "task_vector_match", "entropy")


def test_measuring_twice_gives_the_same_numbers(measurer, adapters):
    before = [a.modules[m].a.clone() for a in adapters for m in a.modules]
    wanted = Wanted(Setting("ties", {"density": 0.5}, 2), AIMS)
    one = measurer.measure(wanted)
    measurer.measure(Wanted(Setting("dare_ties", {"scale": 2.0}), AIMS))
    assert measurer.measure(wanted) == one
    assert set(one.metrics) == {*AIMS, "validation_worst", "output_rank", "output_bytes"}
    assert one.metrics["output_rank"] == 2
    assert one.metrics["output_bytes"] == 4 * 4 * 2 * (16 + 16)
    after = [a.modules[m].a for a in adapters for m in a.modules]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_scores_are_those_of_the_written_adapter(measurer, adapters):
    found = measurer.measure(Wanted(Setting("soup"), ("validation_worst",)))
    scores = evaluate(
        measurer.base, merge(adapters, "soup").adapter, dict(measurer.material.scored)
    )
    assert found.scores == {task: one.score.value for task, one in scores.items()}
    assert found.metrics["validation_worst"] <= found.metrics["validation_mean"]


def test_a_part_is_the_first_examples(measurer):
    wanted = Wanted(Setting("soup"), ("validation_mean", "row_space_match"))
    whole = measurer.measure(wanted)
    same = measurer.measure(Wanted(wanted.setting, wanted.objectives, examples=12))
    part = measurer.measure(Wanted(wanted.setting, wanted.objectives, examples=5))
    assert same.metrics["validation_mean"] == whole.metrics["validation_mean"]
    assert part.metrics["row_space_match"] != whole.metrics["row_space_match"]


def _learned(measurer, adapters):
    spec = spec_of("nsc", LEARN)
    data = LearnerData(measurer.material.data.inputs)
    tasks = data.batched(adapters, measurer.base.reader, 4)
    return learn(measurer.base.model, plan_of(spec, adapters).learning(measurer.base), tasks)


def test_a_learned_trial_is_what_jobs_learn_learns(measurer, adapters):
    expected = rebuilt(_learned(measurer, adapters), adapters)
    found = measurer.merged(Setting("nsc", learn=LEARN))
    for module, factors in expected.items():
        assert torch.equal(found.modules[module].delta(), factors.delta())


def test_a_paused_learner_goes_on_where_it_was(measurer):
    setting = Setting("nsc", learn=LEARN)
    whole = measurer.merged(setting)
    start = measurer.merged(setting, 2)
    assert fingerprint_of(start.modules) != fingerprint_of(whole.modules)
    for steps in (4, 6):
        last = measurer.merged(setting, steps)
    assert fingerprint_of(last.modules) == fingerprint_of(whole.modules)


def test_equal_coefficients_are_task_arithmetic(measurer, adapters):
    weights = {task: [0.3, 0.3] for task in TASKS}
    found = measurer.merged(Setting("task_arithmetic", {"weights": weights}))
    expected = merge(adapters, "task_arithmetic", params={"scale": 0.3}).adapter
    for module in MODULES:
        torch.testing.assert_close(found.modules[module].delta(), expected.modules[module].delta())


def test_a_group_can_be_left_out(measurer):
    weights = {task: [0.0, 2.0] for task in TASKS}
    found = measurer.merged(Setting("task_arithmetic", {"weights": weights}))
    norms = {m: float(f.delta().norm()) for m, f in found.modules.items()}
    assert all((norm == 0) == (".0." in module) for module, norm in norms.items())


def test_start_points(measurer, adapters, tmp_path):
    from icm_ray.evidence.learned import save_learned

    row = SearchRow(method="task_arithmetic", search={"layers.*.*": "uniform(0, 1)"})
    space = space_of(row, TASKS, 2)
    save_learned(_learned(measurer, adapters), tmp_path / "learned")
    uniform, learned = starts_of(["uniform", str(tmp_path / "learned")], space, sorted(MODULES))
    assert uniform == ("uniform", dict.fromkeys(space.dimensions, 0.5))
    assert set(learned[1]) == set(space.dimensions)
    assert all(value == pytest.approx(0.4, abs=0.31) for value in learned[1].values())
    assert len(set(learned[1].values())) > 1
    (placed,) = starts_of(["learned"], space, sorted(MODULES), tmp_path.joinpath)
    assert placed == ("learned", learned[1])

    ties = space_of(
        SearchRow(method="ties", search={"params.density": "uniform(0.1, 1)"}), TASKS, 1
    )
    assert starts_of(["default", {"params.*": 1}], ties, []) == [
        ("default", {"params.density": 0.2}),
        ("recipe", {"params.density": 1.0}),
    ]
    for wrong in ({"params.density": 3.0}, {"params.scale": 1.0}):
        with pytest.raises(RecipeError, match="start"):
            starts_of([wrong], ties, [])


FUSION = {"vae": {"hidden": 8, "latent": 2}, "vae_steps": 6, "meta_steps": 2, "batch": 4}


def test_a_fusion_vae_is_trained_once_for_settings_that_only_use_it_otherwise(measurer, adapters):
    metrics = {}
    for rule in ("mean", "arithmetic"):
        setting = Setting("icm_fusion", {"rule": rule, "residual": False}, fusion=FUSION)
        metrics[rule] = measurer.measure(Wanted(setting, ("task_vector_match",))).metrics
        kept = measurer.fused
        assert kept is not None
        metrics[rule, "model"] = kept[1]
    assert metrics["mean", "model"] is metrics["arithmetic", "model"]
    assert metrics["mean"]["task_vector_match"] != metrics["arithmetic"]["task_vector_match"]
    other = Setting("icm_fusion", fusion={**FUSION, "kl_weight": 1.0})
    found = measurer.measure(Wanted(other, ("kl_total",))).metrics
    assert found["kl_total"] < metrics["mean"]["kl_total"]
    material = measurer.material
    model = train_fusion(
        fusion_spec_of({**FUSION, "kl_weight": 1.0}),
        adapters,
        material.checkpoints,
        (measurer.base, material.data.batched(adapters, measurer.base.reader, 4)),
    )
    assert model.report["kl_total"] == found["kl_total"]
    errors = model.report["reconstruction_error"].values()
    assert found["reconstruction_error"] == pytest.approx(sum(errors) / len(errors))


def test_what_a_fusion_vae_does_not_have_is_refused():
    row = SearchRow(method="icm_fusion", search={"fusion.vae.latents": "int(4, 8)"})
    with pytest.raises(RecipeError, match=r"fusion\.vae\.latents"):
        space_of(row, TASKS, 1)
    with pytest.raises(RecipeError, match=r"fusion\.kl_weight"):
        space_of(SearchRow(method="ties", search={"fusion.kl_weight": "uniform(0, 1)"}), TASKS, 1)
    searched = {"fusion.kl_weight": "loguniform(0.001, 1)", "fusion.inner.steps": "int(1, 3)"}
    fixed = {"inner": {"lr": 0.1}}
    space = space_of(SearchRow(method="icm_fusion", search=searched, fusion=fixed), TASKS, 1)
    setting = space.setting({"fusion.kl_weight": 0.5, "fusion.inner.steps": 2})
    assert setting.fusion == {"inner": {"lr": 0.1, "steps": 2}, "kl_weight": 0.5}
    assert fixed == {"inner": {"lr": 0.1}}
