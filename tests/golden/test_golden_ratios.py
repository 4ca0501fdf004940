"""Null-space ratios of a tiny Llama beside those of the NSC authors' code."""

import pytest
import torch
from safetensors.torch import load_file
from test_golden import DATA, MANIFEST
from torch import Tensor, nn

from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import Batch
from icm_ray.evidence.gather import gather
from icm_ray.linalg.subspace import null_space_ratio, row_space
from icm_ray.types import Adapter, LoRAFactors

TASKS = tuple(f"task{k}" for k in range(4))
HOOKED = ("layers.2.self_attn.v_proj", "layers.3.self_attn.v_proj")
START = 0.4
"""Every coefficient's start value, and the state the stored numbers belong to."""

THEIRS = load_file(DATA / "nsc_v_last2.safetensors")
MASKED = load_file(DATA / "derived_nsc_v_last2_masked.safetensors")
TOLERANCE = {k: MANIFEST["cases"]["nsc_v_last2"]["tolerance"][k] for k in ("rtol", "atol")}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """The stored base, a LlamaModel of four layers."""
    from transformers import LlamaConfig, LlamaModel

    params = dict(MANIFEST["cases"]["nsc_tiny_base"]["params"])
    theta = params.pop("rope_theta")
    config = LlamaConfig(**params, rope_parameters={"rope_type": "default", "rope_theta": theta})
    config._attn_implementation = "eager"
    model = LlamaModel(config).eval().requires_grad_(False)
    weights = load_file(DATA / "nsc_tiny_base.safetensors")
    model.load_state_dict({n: w for n, w in weights.items() if n in model.state_dict()})
    return model


def inputs(task: str) -> Batch:
    stored = load_file(DATA / "nsc_tiny_base.safetensors")
    ids, mask = stored[f"input_ids.{task}"].long(), stored[f"attention_mask.{task}"].bool()
    return Batch(ids, mask, torch.arange(len(ids)))


def adapter(adapter_around, task: str) -> Adapter:
    stored = load_file(DATA / "nsc_tiny_adapters.safetensors")
    names = {key.split(".", 1)[1].rsplit(".", 1)[0] for key in stored}
    return adapter_around(
        task,
        {n: LoRAFactors(stored[f"{task}.{n}.lora_A"], stored[f"{task}.{n}.lora_B"]) for n in names},
    )


@pytest.fixture(scope="module")
def merged(adapter_around) -> Adapter:
    """The stored adapters, each with the start coefficient."""
    from icm_ray import merge

    given = [adapter(adapter_around, task) for task in TASKS]
    return merge(given, "task_arithmetic", params={"scale": START}).adapter


@torch.no_grad()
def inputs_of_modules(model: nn.Module, merged: Adapter, batch: Batch) -> dict[str, Tensor]:
    seen = {}

    def keep(path: str):
        return lambda _module, given: seen.__setitem__(path, given[0])

    handles = [model.get_submodule(p).register_forward_pre_hook(keep(p)) for p in HOOKED]
    try:
        with applied(model, merged):
            model(input_ids=batch.ids, attention_mask=batch.mask.long())
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_ratios_and_inputs_equal_the_reference(llama, merged, adapter_around, task: str) -> None:
    batch, own = inputs(task), adapter(adapter_around, task)
    seen = inputs_of_modules(llama, merged, batch)
    for path in HOOKED:
        ratios = null_space_ratio(seen[path].flatten(0, 1), row_space(own.modules[path].a))
        if f"z.{task}.{path}" in THEIRS:
            torch.testing.assert_close(seen[path], THEIRS[f"z.{task}.{path}"], rtol=1e-4, atol=1e-4)
            theirs = THEIRS[f"tokratio.{task}.{path}"]
            torch.testing.assert_close(ratios.reshape(theirs.shape), theirs, **TOLERANCE)
        torch.testing.assert_close(ratios.mean()[None], THEIRS[f"ratio.{task}.{path}"], **TOLERANCE)
        without_padding = ratios[batch.mask.flatten()].mean()[None]
        torch.testing.assert_close(without_padding, MASKED[f"ratio.{task}.{path}"], **TOLERANCE)


def test_the_loss_is_the_mean_of_the_ratios() -> None:
    for stored in (THEIRS, MASKED):
        ratios = [stored[f"ratio.{task}.{path}"] for task in TASKS for path in HOOKED]
        torch.testing.assert_close(torch.stack(ratios).mean()[None], stored["loss"], **TOLERANCE)


def test_gathered_ratios_leave_padding_out_too(llama, adapter_around) -> None:
    own, batch = adapter(adapter_around, "task1"), inputs("task1")
    assert not batch.mask.all(), "there is padding to leave out"
    ratios = gather(llama, own, [batch]).expert_ratios
    seen = inputs_of_modules(llama, own, batch)
    for path in HOOKED:
        direct = null_space_ratio(seen[path][batch.mask], row_space(own.modules[path].a))
        assert ratios[path] == pytest.approx(float(direct.double().mean()), rel=1e-5)
