"""LoRA of experts inside one parameter: every number against what PEFT itself merges."""

import pytest
import torch
from model_classes import KINDS, TEXT, TOKENS, quiet
from safetensors.torch import load_file, save_file

import icm_ray
from icm_ray.adapters import check_base, open_adapter, open_all, verify_forward, verify_with_peft
from icm_ray.adapters.fused import expert_slice, is_expert, matched_path, refuse_experts
from icm_ray.errors import InputError
from icm_ray.types import Adapter, LoRAFactors

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **TEXT, **TOKENS, head_dim=8, num_key_value_heads=1, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=1,
        )
    )  # fmt: skip


def gpt_oss():
    """Its parameters are (experts, d_in, d_out), and have biases between them."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            **TEXT, **TOKENS, head_dim=8, num_key_value_heads=1, num_local_experts=4,
            num_experts_per_tok=2,
        )
    )  # fmt: skip


MODELS = {"mixtral": KINDS["mixtral"].build, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
ADAPTERS = {
    "both": {"r": 2, "lora_alpha": 4, "target_parameters": EXPERTS, "target_modules": ["q_proj"]},
    # alone on its module, so that it is the outer wrapper there; in "both" it is the outer too
    "down": {"r": 3, "use_rslora": True, "target_parameters": EXPERTS[1:], "target_modules": []},
    # the inner one of "both" is here the only one
    "up": {"r": 1, "target_parameters": EXPERTS[:1], "target_modules": ["v_proj"]},
    "patterns": {
        "r": 2, "lora_alpha": 2, "target_modules": ["v_proj"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"experts.down_proj": 4},
        "alpha_pattern": {r"layers\.0\.mlp\.experts\.gate_up_proj": 7},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def moe(request, tmp_path_factory):
    """Return a base's folder, its class, and the folders of four adapters PEFT made."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    quiet(lambda: model.save_pretrained(place / "base"))
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        fresh = quiet(lambda: type(model).from_pretrained(place / "base"))
        own = quiet(lambda m=fresh, o=options: get_peft_model(m, LoraConfig(**o)))
        torch.manual_seed(seed)
        for key, parameter in own.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        quiet(lambda m=own, n=name: m.save_pretrained(str(place / n)))
    return place, type(model)


def changes(moe, folder):
    """Return what PEFT's own merge adds to every parameter of the base."""
    from peft import PeftModel

    place, kind = moe
    model = quiet(lambda: kind.from_pretrained(place / "base", dtype=torch.float32))
    plain = {name: x.detach().clone() for name, x in model.named_parameters()}
    merged = quiet(lambda: PeftModel.from_pretrained(model, folder)).merge_and_unload()
    return {name: x.detach() - plain[name] for name, x in merged.named_parameters()}


def assert_is(adapter, changed, is_turned):
    """Every module's delta is PEFT's change, and PEFT changes nothing else."""
    seen = set()
    for module, factors in adapter.modules.items():
        layout = adapter.layouts.get(module)
        name = matched_path(module, layout) if is_expert(layout) else f"{module}.weight"
        theirs = expert_slice(changed[name], layout) if is_expert(layout) else changed[name]
        theirs = theirs.T if is_expert(layout) and is_turned else theirs
        torch.testing.assert_close(theirs, factors.delta(), rtol=1e-5, atol=1e-6)
        seen.add(name)
    assert all(not change.any() for name, change in changed.items() if name not in seen)


def load_all(place):
    files = open_all([(name, place / name) for name in ADAPTERS])
    return [file.load() for file in files]


def test_every_expert_changes_as_in_peft(moe) -> None:
    place, kind = moe
    for adapter in load_all(place):
        assert_is(adapter, changes(moe, place / adapter.name), "GptOss" in kind.__name__)
    file = open_adapter(place / "both")
    assert file.format == "PEFT, fused experts"
    assert len([m for m in file.shapes if is_expert(file.layouts.get(m))]) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("method", "params", "rank"),
    [("task_arithmetic", {"scale": 0.7}, None), ("svd", {}, 3), ("ties", {"density": 0.3}, None)],
)
def test_merges_are_what_peft_loads(moe, method, params, rank, tmp_path) -> None:
    """The dense sums are made here from PEFT's own changes, not from ours."""
    place, kind = moe
    result = icm_ray.merge(load_all(place), method, params=params, output_rank=rank)
    icm_ray.save_adapter(result.adapter, tmp_path / "out")
    assert verify_with_peft(tmp_path / "out", result.adapter)["max_relative_error"] < 1e-5
    verify_forward(tmp_path / "out", result.adapter, place / "base")
    found = changes(moe, tmp_path / "out")
    assert_is(result.adapter, found, "GptOss" in kind.__name__)
    if method == "task_arithmetic":
        each = [changes(moe, place / name) for name in ADAPTERS]
        for name, change in found.items():
            total = 0.7 * sum(own[name] for own in each)
            torch.testing.assert_close(change, total, rtol=1e-4, atol=1e-5)
    if method == "svd":
        each = [changes(moe, place / name) for name in ADAPTERS]
        name = "model.layers.1.mlp.experts.down_proj"
        dense = sum(own[name][2] for own in each) / len(each)
        u, s, v = torch.linalg.svd(dense, full_matrices=False)
        torch.testing.assert_close(found[name][2], u[:, :3] * s[:3] @ v[:3], rtol=1e-3, atol=1e-5)


def test_experts_of_unequal_ranks_share_the_largest(moe, tmp_path) -> None:
    place, _ = moe
    result = icm_ray.merge(load_all(place), "svd", output_rank="energy:0.9")
    ranks = {result.adapter.modules[m].rank for m in result.adapter.layouts}
    assert len(ranks) > 1
    icm_ray.save_adapter(result.adapter, tmp_path / "out")
    verify_with_peft(tmp_path / "out", result.adapter)
    again = icm_ray.load_adapter(tmp_path / "out")
    for module, factors in result.adapter.modules.items():
        torch.testing.assert_close(again.modules[module].delta(), factors.delta())


def test_a_router_is_a_parameter_of_one_expert(moe, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    place, kind = moe
    router = "router.weight" if "GptOss" in kind.__name__ else "gate.weight"
    model = quiet(lambda: kind.from_pretrained(place / "base"))
    config = LoraConfig(r=2, target_modules=[], target_parameters=[router], init_lora_weights=False)
    quiet(lambda: get_peft_model(model, config).save_pretrained(str(tmp_path / "router")))
    adapter = icm_ray.load_adapter(tmp_path / "router")
    assert set(adapter.layouts.values()) == {"expert:0/1"}
    assert_is(adapter, changes(moe, tmp_path / "router"), is_turned=False)
    icm_ray.save_adapter(adapter, tmp_path / "again")
    verify_forward(tmp_path / "again", adapter, place / "base")


def test_what_runs_modules_one_by_one_is_refused_by_name(moe) -> None:
    place, _ = moe
    with pytest.raises(InputError, match=r"both: .*jobs\.learn sees the inputs of mod"):
        open_all([("both", place / "both")], run_by="jobs.learn")
    refuse_experts([Adapter("a", None, {}, {}, "")], "anything")


def test_a_base_with_other_experts_is_named(moe) -> None:
    place, _ = moe
    layouts = {"model.layers.0.mlp.experts.down_proj.0": "expert:0/8"}
    factors = {m: LoRAFactors(torch.ones(1, 9), torch.ones(16, 1)) for m in layouts}
    eight = Adapter("a", None, factors, {}, "", layouts=layouts)
    with pytest.raises(InputError, match="8 experts of 16 x 9 but the base's"):
        check_base([eight], place / "base")


def damaged(place, target, change):
    """Copy an adapter with its tensors changed by hand."""
    tensors = load_file(place / "both" / "adapter_model.safetensors")
    target.mkdir()
    text = (place / "both" / "adapter_config.json").read_text()
    tensors, text = change(tensors, text)
    (target / "adapter_config.json").write_text(text)
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t, c: ({k: v for k, v in t.items() if "base_layer" not in k}, c),
            r"1 pairs of factors but target_parameters names \[.*down_proj",
        ),
        (
            lambda t, c: (t, c.replace("experts.gate_up_proj", "experts.odd_proj")),
            "odd_proj, beside another parameter .* but one of weight",
        ),
        (
            lambda t, c: (t, c.replace('"r": 2', '"r": 3')),
            r"A \[8, .* of rank 3 but \(experts \* rank, d_in\)",
        ),
    ],
)  # fmt: skip
def test_factors_that_cannot_be_told_apart_are_refused(change, said, moe, tmp_path) -> None:
    place, _ = moe
    with pytest.raises(InputError, match=said):
        open_adapter(damaged(place, tmp_path / "damaged", change))
