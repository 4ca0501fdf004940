"""A quantised base does what the base of its unpacked numbers does, in every use."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from base_samples import save_packed, save_unpacked
from safetensors.torch import load_file, save_file

from icm_ray.adapters import save_adapter
from icm_ray.base_model.loading import Base, fingerprint_weights, load_base, load_weights
from icm_ray.base_model.placing import Place
from icm_ray.base_model.shared_base import share_base
from icm_ray.base_model.states import hidden_states, make_batches, tokenize
from icm_ray.config import ExpertSet, LearnSpec, LoRARecipe, Training, changed
from icm_ray.errors import InputError
from icm_ray.evaluation.scoring import TaskData, evaluate
from icm_ray.evidence.gather import gather
from icm_ray.evidence.grams import gather_grams
from icm_ray.finetuning.expert import ExpertJob, Lesson
from icm_ray.finetuning.training import train_experts
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import learn
from icm_ray.learning.recipes import LEARNERS, plan_of
from icm_ray.suites.tasks import Examples, Task
from icm_ray.types import Adapter

NEAR = {4: 1e-5, 8: 5e-2}
"""Relative distance from the unpacked base: with 8 bits, inputs of layers are rounded as well."""
MODULES = {f"model.layers.{i}.self_attn.{part}_proj": (16, 16) for i in (0, 1) for part in "qo"}


@pytest.fixture(scope="module", params=[4, 8])
def bits(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def packed(tiny_llama, bits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "base"
    save_packed(tiny_llama, folder, bits)
    return folder


@pytest.fixture(scope="module")
def bases(tiny_llama, packed, tmp_path_factory) -> tuple[Base, Base]:
    """The packed base, and the one of its unpacked numbers."""
    folder = tmp_path_factory.mktemp("unpacked") / "base"
    save_unpacked(tiny_llama, packed, folder)
    return load_base(packed), load_base(folder)


@pytest.fixture(scope="module")
def adapters(make_adapter) -> list[Adapter]:
    return [make_adapter(name, shapes=MODULES, spread=0.4) for name in ("code", "law")]


@pytest.fixture(scope="module")
def tasks(bases, adapters, texts) -> list[TaskInputs]:
    batches = make_batches(tokenize(bases[0].tokenizer, texts[:8], 16), 4, 0)
    return [TaskInputs(adapter, batches, kind="language_modelling") for adapter in adapters]


def near(found: torch.Tensor, expected: torch.Tensor, bits: int) -> None:
    assert (found - expected).norm() <= NEAR[bits] * expected.norm()


def test_it_is_loaded_as_it_is_stored(packed, bases, bits) -> None:
    layer = bases[0].model.get_submodule("layers.0.self_attn.q_proj")
    assert type(layer).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert next(layer.parameters()).dtype == {4: torch.uint8, 8: torch.int8}[bits]
    assert not any(weight.requires_grad for weight in bases[0].whole.parameters())
    half = load_base(packed, Place(dtype="bfloat16")).model
    assert half.dtype == torch.bfloat16
    assert half(torch.tensor([[2, 5, 3]])).last_hidden_state.dtype == torch.bfloat16


def test_its_states_are_those_of_its_numbers(bases, tasks, bits) -> None:
    with torch.no_grad():
        for batch in tasks[0].batches:
            near(*(hidden_states(base.model, batch)[batch.mask] for base in bases), bits)


@pytest.mark.gpu
def test_a_gpu_computes_the_same(packed, bases, tasks) -> None:
    there = load_base(packed, Place(device="cuda"))
    assert {weight.device.type for weight in there.whole.parameters()} == {"cuda"}
    batch = tasks[0].batches[0]
    with torch.no_grad():
        states, expected = (hidden_states(b.model, batch).cpu() for b in (there, bases[1]))
    near(states[batch.mask], expected[batch.mask], 8)  # kernels of their own round otherwise


def test_its_fingerprint_is_of_its_files(packed, tmp_path) -> None:
    known = share_base(packed)
    assert known.dtype == "float32"
    assert known.fingerprint == fingerprint_weights(load_file(packed / "model.safetensors"))
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({**weights, name: weights[name] + 1}, copy / "model.safetensors", {"format": "pt"})
    assert share_base(copy).fingerprint != known.fingerprint


def test_evidence_and_grams(bases, tasks, bits) -> None:
    task = tasks[0]
    found, expected = (gather(base.model, task.adapter, task.batches) for base in bases)
    near(found.task_vector, expected.task_vector, bits)
    assert found.expert_ratios == pytest.approx(expected.expert_ratios, rel=NEAR[bits])
    found, expected = (
        gather_grams(base.model, task.adapter, list(MODULES), task.batches) for base in bases
    )
    assert set(found.grams) == set(MODULES)
    for module, gram in expected.grams.items():
        near(found.grams[module].square(), gram.square(), bits)


@pytest.mark.parametrize("name", ["nsc", "distillation"])
def test_a_learner_learns_the_same(bases, adapters, tasks, bits, name) -> None:
    changes = {"optimisation": {"steps": 2}, "start": {"residual": None, "value": "1/K"}}
    spec: LearnSpec = changed(LEARNERS[name], changes, name)
    found, expected = (
        learn(base.model, plan_of(spec, adapters).learning(base), tasks) for base in bases
    )
    for task, losses in found.report["losses"].items():
        theirs = expected.report["losses"][task]
        for when in ("start", "end"):
            assert losses[when] == pytest.approx(theirs[when], rel=NEAR[bits])
        assert losses["start"] != losses["end"]


def test_scores(bases, adapters, texts, bits) -> None:
    task = Task("one", "language_modelling", "token_likelihood", (), 16, "nowhere", "none")
    data = {"one": TaskData(task, Examples(tuple(texts), np.zeros(len(texts)), texts), None)}
    found, expected = (evaluate(base, adapters[0], data)["one"].predictions for base in bases)
    np.testing.assert_allclose(found, expected, rtol=NEAR[bits])


def test_an_expert_trains_on_it(bases, texts, bits, tmp_path) -> None:
    task = Task("one", "language_modelling", "token_likelihood", (), 16, "nowhere", "none")
    lora = LoRARecipe(rank=2, alpha=4, targets=["q_proj"])
    training = Training(steps=3, batch=4, checkpoints=2)
    job = ExpertJob(task, lora, training, ExpertSet(), ("one",))
    examples = Examples(tuple(texts), np.zeros(len(texts)), texts)
    losses = []
    for number, base in enumerate(bases):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        (trained,) = train_experts(base, [Lesson(job, examples, None)], scratch)
        losses.append(trained.losses)
        trained.model.unload()
    assert losses[0] == pytest.approx(losses[1], rel=NEAR[bits])


def test_a_merge_is_verified_on_it(packed, make_adapter, tmp_path, cli) -> None:
    for name in ("code", "law"):
        config = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
        adapter = make_adapter(name, shapes=MODULES, base_model=str(packed), config=config)
        save_adapter(adapter, tmp_path / name)
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(
        json.dumps(
            {
                "base": str(packed),
                "adapters": [str(tmp_path / "code"), str(tmp_path / "law")],
                "method": "soup",
                "output": str(tmp_path / "both"),
            }
        )
    )
    code, out, err = cli("merge", "-c", recipe)
    assert code == 0, err
    assert "verified" in out


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"\"gptq\" but gptqmodel and optimum is not inst"),
        ({"quant_method": "awq"}, '"awq" but gptqmodel is not installed. Run pip install gptqm'),
        ({"quant_method": "zip"}, r"\"zip\" but one of awq, bitsandbytes, .* Give the base that"),
        ({"bits": 4}, r"\"unknown\" but one of awq"),
    ],
)
def test_what_cannot_be_unpacked_is_refused_by_name(packed, tmp_path, said, text) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "base"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    with pytest.raises(InputError, match=rf"base/config\.json: quantization_config: {text}"):
        load_weights(copy)


def test_a_packed_base_is_whole_or_refused(packed, tmp_path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "base"))
    weights = load_file(copy / "model.safetensors")
    weights.pop("model.layers.1.input_layernorm.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.input_layernorm\.weight: not among"):
        load_base(copy)
