"""Experts trained on Ray: whole, kept by content, the same bytes for any number of workers."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from ray_samples import finetune_recipe, hashes, session_on, stamps

from icm_ray.adapters import load_adapter
from icm_ray.base_model.loading import fingerprint_weights, load_base, load_weights
from icm_ray.base_model.states import features, make_batches, tokenize
from icm_ray.distributed.probes import read_probe
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.probe import fit_probe
from icm_ray.files import read_json, read_manifest
from icm_ray.finetuning.trajectory import read_trajectory, unflatten
from icm_ray.suites import SUITES
from icm_ray.workflows.experts import expert_jobs, expert_key, find_or_train, probes_of

SET = "shared-seed0"
TASKS = ("depth", "supersense")


@pytest.fixture(scope="module")
def session(tiny_bert, ray_session):
    return session_on(tiny_bert, workers=2, cpus_per_worker=0.5)


@pytest.mark.slow
def test_every_expert_is_a_whole_folder(experts, tiny_bert):
    for task in TASKS:
        folder = experts / "experts" / SET / task
        manifest = read_manifest(folder)
        assert manifest["task"] == task
        assert set(manifest["files"]) >= {
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "head.safetensors",
            "metrics.json",
        }
        assert len(read_json(folder / "metrics.json")["losses"]) == 6
        assert Expert(task, folder).head().weight.shape[1] == 16
    assert not list(experts.rglob(".*"))
    adapters = [load_adapter(experts / "experts" / SET / task / "adapter") for task in TASKS]
    assert [a.base_model for a in adapters] == [str(tiny_bert)] * 2
    assert adapters[0].fingerprint != adapters[1].fingerprint
    assert all(a.config["target_modules"] == ["query", "value"] for a in adapters)
    module = next(iter(adapters[0].modules))
    # A shared start shows: A moves little from where both tasks began.
    one, other = (a.modules[module].a for a in adapters)
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9


@pytest.mark.slow
def test_the_checkpoints_of_the_second_half_are_a_data_set(experts):
    for task in TASKS:
        folder = experts / "trajectories" / SET / task
        read_manifest(folder)
        table, layout = read_trajectory(folder)
        assert table["step"].to_pylist() == [4, 5, 6]
        assert table.column_names == ["step", "loss", "adapter"]
        last = unflatten(np.array(table["adapter"][2].as_py(), dtype=np.float32), layout)
        final = load_adapter(experts / "experts" / SET / task / "adapter")
        for module, factors in final.modules.items():
            a = last[f"base_model.model.{module}.lora_A.weight"]
            assert torch.equal(a, factors.a)


@pytest.mark.slow
def test_a_second_run_trains_nothing(experts, tiny_bert, session):
    before = stamps(experts)
    found = find_or_train(session, finetune_recipe(tiny_bert, experts), experts)
    assert {label: set(of_set) for label, of_set in found.items()} == {SET: set(TASKS)}
    assert stamps(experts) == before


@pytest.mark.slow
def test_one_worker_gives_the_bytes_of_two(experts, tiny_bert, session, tmp_path):
    recipe = finetune_recipe(tiny_bert, tmp_path, resources={"workers": 1})
    find_or_train(replace(session, resources=recipe.resources), recipe, tmp_path)
    assert hashes(tmp_path / "experts") == hashes(experts / "experts")
    assert hashes(tmp_path / "trajectories") == hashes(experts / "trajectories")


@pytest.mark.slow
def test_a_group_gives_the_same_bytes_on_any_number_of_workers(tiny_bert, session, tmp_path):
    """Two sets of two tasks that share passes; one expert is lost and made again as it was."""
    training = {"steps": 4, "batch": 8, "train_examples": 48, "tasks_per_forward": 2}
    sets = [{"seed": 0}, {"seed": 1}]
    for workers in (1, 2):
        out = tmp_path / str(workers)
        resources = {"workers": workers, "cpus_per_worker": 0.5}
        recipe = finetune_recipe(tiny_bert, out, training=training, sets=sets, resources=resources)
        found = find_or_train(replace(session, resources=recipe.resources), recipe, out)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    folder = found[SET]["depth"].folder
    assert read_manifest(folder)["together"] == list(TASKS)
    before, kept = hashes(out), stamps(found[SET]["supersense"].folder)
    shutil.rmtree(folder)
    find_or_train(replace(session, resources=recipe.resources), recipe, out)
    assert hashes(out) == before
    assert stamps(found[SET]["supersense"].folder) == kept
    assert not list(out.rglob(".*"))


@pytest.mark.slow
def test_another_seed_trains_other_experts(experts, tiny_bert, session, tmp_path):
    sets = [{"init": "own", "seed": 1}]
    recipe = finetune_recipe(tiny_bert, tmp_path, sets=sets, tasks=["depth"])
    trained = find_or_train(session, recipe, tmp_path)
    assert {label: list(of_set) for label, of_set in trained.items()} == {"own-seed1": ["depth"]}
    found = load_adapter(trained["own-seed1"]["depth"].adapter)
    before = load_adapter(experts / "experts" / SET / "depth" / "adapter")
    assert found.fingerprint != before.fingerprint


@pytest.mark.slow
def test_other_steps_train_again_in_the_same_place(tiny_bert, session, tmp_path):
    keys = []
    for steps in (2, 3, 3):
        training = {"steps": steps, "batch": 8, "train_examples": 48}
        recipe = finetune_recipe(tiny_bert, tmp_path, training=training, tasks=["depth"])
        folder = find_or_train(session, recipe, tmp_path)[SET]["depth"].folder
        assert len(read_json(folder / "metrics.json")["losses"]) == steps
        keys.append(read_manifest(folder)["key"])
    assert keys[0] != keys[1] == keys[2]


@pytest.mark.slow
def test_ready_experts_are_used_only_if_they_are_these(experts, tiny_bert, session, tmp_path):
    recipe = finetune_recipe(tiny_bert, tmp_path, tasks=["depth"])
    ready = str(experts / "experts")
    found = find_or_train(session, recipe, tmp_path, ready)
    assert found[SET]["depth"].folder == experts / "experts" / SET / "depth"
    assert not (tmp_path / "experts").exists()
    other = finetune_recipe(tiny_bert, tmp_path, tasks=["depth"], dtype="float16")
    found = find_or_train(session, other, tmp_path, ready)
    assert found[SET]["depth"].folder == tmp_path / "experts" / SET / "depth"


def test_every_hyper_parameter_counts_but_how_often_the_state_is_saved(tiny_bert, tmp_path):
    def key(base="b", data="d", validation=24, dtype="float32", **changes):
        sizes = {"calibration": 12, "validation": validation, "test": 24}
        recipe = finetune_recipe(tiny_bert, tmp_path, sizes=sizes, dtype=dtype, **changes)
        job = next(iter(expert_jobs(recipe, SUITES["text"]).values()))
        return expert_key(job, base, data, recipe)

    training = {"steps": 6, "batch": 8, "train_examples": 48, "checkpoints": 3}
    assert key(training={**training, "save_every": 1}) == key()
    keys = {
        key(),
        key(base="c"),
        key(data="e"),
        key(validation=25),
        key(dtype="float16"),
        key(tasks=["supersense"]),
        key(sets=[{"seed": 1}]),
        key(sets=[{"init": "own"}]),
        key(lora={"rank": 3}),
        *(key(training={**training, name: 7}) for name in ("steps", "batch", "checkpoints")),
        *(key(training={**training, name: 0.1}) for name in ("lora_lr", "head_lr")),
        key(training={**training, "tasks_per_forward": 2}),
    }
    assert len(keys) == 15


@pytest.mark.slow
def test_training_leaves_the_base_alone(experts, session):
    shared = session.shared
    assert fingerprint_weights(load_weights(shared.path)) == shared.fingerprint


@pytest.mark.slow
def test_probes_are_the_serial_ones_and_kept_by_content(tiny_bert, session, tmp_path):
    recipe = finetune_recipe(tiny_bert, tmp_path)
    suite = SUITES["text"]

    def probes(**sizes):
        changed = recipe.model_copy(update={"sizes": recipe.sizes.model_copy(update=sizes)})
        return probes_of(session, changed, tmp_path)

    folders = probes()
    base = load_base(tiny_bert)
    for task in TASKS:
        found = {}
        for split, limit in (("train", 48), ("validation", 24), ("test", 24)):
            examples = suite.load(task, split, limit)
            ids = tokenize(base.tokenizer, examples.texts, suite.tasks[task].max_tokens)
            batches = make_batches(ids, 64, base.tokenizer.pad_token_id)
            found[split] = (features(base.model, batches), examples.targets)
        expected = fit_probe(suite.tasks[task], found["train"], found["validation"])
        head, predictions = read_probe(folders[task])
        assert torch.equal(head.weight, expected.weight)
        assert (predictions == expected.predict(found["test"][0], suite.tasks[task])).all()
    before = stamps(tmp_path)
    assert probes() == folders
    assert stamps(tmp_path) == before
    probes(test=20)
    assert len(read_probe(folders["depth"])[1]) == 20
