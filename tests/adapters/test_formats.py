"""Adapters of other tools: read by the formats' own formulas, or named with the way on."""

import json

import pytest
import torch
from adapter_samples import PREFIX, plain_config, plain_tensors, relative
from safetensors.torch import save_file

from icm_ray.adapters import load_adapter, open_adapter
from icm_ray.adapters.formats.kohya import mangled, module_path
from icm_ray.errors import InputError

DRAW = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=DRAW)


def kohya_of(modules, *, alpha=None, d_in=5, d_out=6):
    """Return a kohya file's tensors; `modules` gives the rank by name."""
    tensors = {}
    for name, rank in modules.items():
        tensors[f"{name}.lora_down.weight"] = draw(rank, d_in)
        tensors[f"{name}.lora_up.weight"] = draw(d_out, rank)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def mlx_folder(path, tensors, **settings):
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapters.safetensors")
    plain = {"fine_tune_type": "lora", "model": "org/base", "num_layers": 4}
    plain["lora_parameters"] = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    (path / "adapter_config.json").write_text(json.dumps({**plain, **settings}))
    return path


def mlx_tensors(d_in=5, rank=2, d_out=6, **more):
    key = "model.layers.3.self_attn.q_proj"
    return {f"{key}.lora_a": draw(d_in, rank), f"{key}.lora_b": draw(rank, d_out), **more}


def sharded_folder(path, changes=None):
    """Write a PEFT adapter whose every module's A and B are in different shards."""
    path.mkdir()
    tensors = plain_tensors()
    names = {
        key: f"adapter_model-0000{1 + ('lora_B' in key)}-of-00002.safetensors" for key in tensors
    }
    for shard in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == shard}, path / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {**names, **(changes or {})}}
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not ...}
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (path / "adapter_config.json").write_text(json.dumps(plain_config()))
    return path


def problems_of(path):
    with pytest.raises(InputError) as error:
        open_adapter(path)
    return error.value.problems


def test_kohya_is_alpha_over_rank_times_up_times_down(tmp_path):
    tensors = kohya_of({"lora_unet_mid_block_attentions_0_proj_in": 2}, alpha=3.0)
    tensors |= kohya_of({"lora_te2_text_model_encoder_layers_1_mlp_fc1": 4})
    save_file(tensors, tmp_path / "style.safetensors")
    file = open_adapter(tmp_path / "style.safetensors")
    assert (file.name, file.format) == ("style", "kohya")
    modules = file.load().modules
    for name, path, scaling in (
        ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in", 1.5),
        (
            "lora_te2_text_model_encoder_layers_1_mlp_fc1",
            "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
            1.0,
        ),
    ):
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        assert relative(modules[path].delta(), scaling * up @ down) < 1e-6


def test_kohyas_convolutions_keep_their_kernels(tmp_path):
    name = "lora_unet_mid_block_resnets_0_conv1"
    down, up = draw(2, 3, 3, 3), draw(4, 2, 1, 1)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "c.safetensors"
    )
    adapter = load_adapter(tmp_path / "c.safetensors")
    assert adapter.layouts == {"unet.mid_block.resnets.0.conv1": "conv:3x3"}
    delta = adapter.modules["unet.mid_block.resnets.0.conv1"].delta()
    assert relative(delta, up.flatten(1) @ down.flatten(1)) < 1e-6


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", ...),
        (
            "lora_transformer_single_transformer_blocks_3_norm_linear",
            "transformer.single_transformer_blocks.3.norm.linear",
        ),
        # Other models' words: the name in the file is all that is known.
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", None),
        ("lora_unet_double_blocks_0_img_attn_qkv", None),
        ("lora_unet_x_to_q", None),
        ("lora_unet_", None),
        ("lycoris_mid_block_attentions_0_proj_in", None),
        ("diffusion_model.blocks.0.self_attn.q", None),
    ],
)
def test_a_kohya_name_is_undone_where_it_can_be_and_kept_where_not(name, path):
    if path is ...:
        path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert module_path(name) == (path or name)
    if path:
        assert mangled(path, two_encoders=False) == name


def test_settings_of_peft_beside_kohyas_weights_are_said_not_to_count(tmp_path):
    tensors = kohya_of({"lora_unet_x_to_q": 4}, alpha=2.0)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain_config(), "lora_alpha": 99}))
    file = open_adapter(tmp_path)
    assert file.scaling == {"lora_unet_x_to_q": 0.5}
    assert any("not read, since the weights are kohya's" in line for line in file.warnings)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"lora_unet_x.dora_scale": torch.ones(4)}, "DoRA is no B A"),
        ({"lora_unet_x.lora_mid.weight": torch.ones(2, 2)}, "third factor"),
        ({"lora_unet_y.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({"lora_unet_y.diff_b": torch.ones(2)}, "Whole weight differences"),
        ({"lora_unet_y.lora_down.weight": torch.ones(2, 5)}, "both factors are expected"),
        ({"lora_unet_x.alpha": torch.ones(3)}, "no positive number"),
        ({"lora_unet_x.alpha": torch.tensor(0.0)}, "no positive number"),
        ({"lora_unet_x.alpha": torch.tensor(float("nan"))}, "no positive number"),
        (
            kohya_of({"lora_te_text_model_encoder_layers_0_mlp_fc1": 2})
            | kohya_of({"lora_te1_text_model_encoder_layers_0_mlp_fc1": 2}),
            "a second A of text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
    ],
)
def test_what_is_no_plain_lora_in_a_kohya_file_is_named(tmp_path, extra, text):
    save_file({**kohya_of({"lora_unet_x": 2}), **extra}, tmp_path / "k.safetensors")
    assert any(text in line for line in problems_of(tmp_path / "k.safetensors"))


def test_diffusers_spellings_of_one_layer_give_one_module(tmp_path):
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    a, b = draw(2, 5), draw(6, 2)
    spellings = (
        (f"{path}.to_out.0.lora_A.weight", f"{path}.to_out.0.lora_B.weight"),
        (f"{path}.to_out.0.lora.down.weight", f"{path}.to_out.0.lora.up.weight"),
        (f"{path}.processor.to_out_lora.down.weight", f"{path}.processor.to_out_lora.up.weight"),
    )
    for key_a, key_b in spellings:
        save_file({key_a: a, key_b: b}, tmp_path / "pytorch_lora_weights.safetensors")
        file = open_adapter(tmp_path)
        assert file.format == "diffusers"
        assert relative(file.factors(f"{path}.to_out.0").delta(), b @ a) < 1e-6


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"unet.use_dora": True, "unet.r": 2}, "DoRA"),
        ({"unet.r": "2"}, "r: .* positive integer"),
    ],
)
def test_settings_saved_with_a_diffusers_file_are_checked_like_pefts(tmp_path, settings, text):
    tensors = {"unet.a.lora_A.weight": draw(2, 5), "unet.a.lora_B.weight": draw(6, 2)}
    save_file(
        tensors,
        tmp_path / "d.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(settings)},
    )
    with pytest.raises(InputError, match=text):
        open_adapter(tmp_path / "d.safetensors")


def test_mlx_is_scale_times_a_times_b_turned(tmp_path):
    tensors = mlx_tensors()
    tensors |= {"model.embed_tokens.lora_a": draw(9, 2), "model.embed_tokens.lora_b": draw(2, 5)}
    file = open_adapter(mlx_folder(tmp_path / "mlx", tensors))
    assert (file.format, file.base_model) == ("MLX", "org/base")
    assert file.layouts == {"model.embed_tokens": "embedding"}
    x = draw(3, 5)
    key = "model.layers.3.self_attn.q_proj"
    theirs = 20.0 * (x @ tensors[f"{key}.lora_a"] @ tensors[f"{key}.lora_b"])
    adapter = file.load()
    assert relative(x @ adapter.modules[key].delta().T, theirs) < 1e-6
    rows = 20.0 * (tensors["model.embed_tokens.lora_a"] @ tensors["model.embed_tokens.lora_b"])
    assert relative(adapter.modules["model.embed_tokens"].delta().T, rows) < 1e-6


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"fine_tune_type": "dora"}, 'fine_tune_type: "dora"'),
        ({"fine_tune_type": "full"}, 'fine_tune_type: "full"'),
        ({"use_dora": True}, 'fine_tune_type: "dora"'),
        ({"lora_parameters": {"rank": 2}}, "the number that MLX multiplies"),
        ({"lora_parameters": {"rank": 2, "scale": True}}, "the number that MLX multiplies"),
        ({"lora_parameters": None}, "the number that MLX multiplies"),
        ({"lora_parameters": {"rank": 2, "scale": 10.0, "alpha": 16}}, "versions disagree"),
    ],
)
def test_mlx_settings_that_do_not_fix_the_change_are_refused(tmp_path, settings, text):
    problems = problems_of(mlx_folder(tmp_path / "mlx", mlx_tensors(), **settings))
    assert any(text in line and "MLX" in line for line in problems)


def test_an_alpha_of_mlx_that_changes_nothing_is_fine(tmp_path):
    parameters = {"rank": 2, "scale": 3.0, "alpha": 2}
    file = open_adapter(mlx_folder(tmp_path / "m", mlx_tensors(), lora_parameters=parameters))
    assert file.scaling == {"model.layers.3.self_attn.q_proj": 3.0}


def test_mlx_experts_and_magnitudes_are_refused(tmp_path):
    experts = mlx_tensors() | {"m.lora_a": draw(8, 5), "m.lora_b": draw(4, 6, 2)}
    assert "Experts in one tensor" in problems_of(mlx_folder(tmp_path / "experts", experts))[0]
    magnitude = mlx_tensors(**{"model.layers.3.self_attn.q_proj.m": draw(6)})
    assert "unknown but MLX's lora_a" in problems_of(mlx_folder(tmp_path / "dora", magnitude))[0]


def test_shards_are_the_whole_adapter(tmp_path, make_folder):
    file = open_adapter(sharded_folder(tmp_path / "shards"))
    assert file.format == "PEFT, sharded"
    whole = open_adapter(make_folder())
    assert file.fingerprint == whole.fingerprint
    assert file.bytes > file.file.stat().st_size
    first = next(iter(whole.shapes))
    assert torch.equal(file.factors(first).b, whole.factors(first).b)


FIRST = f"{PREFIX}layers.0.q.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict.fromkeys(plain_tensors(), ...), "weight_map: {} but the shard of every tensor"),
        ({FIRST: "../adapter_model-00001-of-00002.safetensors"}, "a file beside the index"),
        ({FIRST: 3}, "a file beside the index"),
        ({FIRST: ...}, f"{FIRST}: not of this shard"),
        ({FIRST: "adapter_model-00002-of-00002.safetensors"}, f"{FIRST}: not of this shard"),
        ({"extra.lora_A.weight": "adapter_model-00001-of-00002.safetensors"}, "not in shard"),
        ({FIRST: "gone.safetensors"}, "gone.safetensors: missing"),
    ],
)
def test_an_index_that_is_not_that_of_its_shards_is_refused(tmp_path, changes, text):
    assert any(text in line for line in problems_of(sharded_folder(tmp_path / "s", changes)))


def test_a_shard_that_the_index_forgot_is_refused(tmp_path):
    folder = sharded_folder(tmp_path / "s")
    save_file({"x": torch.ones(1)}, folder / "adapter_model-00003-of-00003.safetensors")
    assert any("00003" in line and "does not list" in line for line in problems_of(folder))


def test_a_long_name_is_read_in_no_long_time():
    assert module_path("lora_unet_" + "_".join("0" * 240)) == "unet." + ".".join("0" * 240)


@pytest.mark.parametrize("form", ["MLX", "PEFT, sharded"])
def test_what_is_opened_by_a_relative_path_is_read_from_any_folder(tmp_path, monkeypatch, form):
    is_mlx = form == "MLX"
    mlx_folder(tmp_path / "a", mlx_tensors()) if is_mlx else sharded_folder(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    file = open_adapter("a")
    assert file.format == form
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert file.load().modules
