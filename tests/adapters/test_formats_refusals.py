"""What is at a path that holds no readable adapter: named, with the way on."""

import json
import os
import subprocess
import sys

import pytest
import torch
from adapter_samples import plain_tensors, raw_safetensors
from safetensors.torch import save_file

from icm_ray.adapters import open_adapter
from icm_ray.adapters.formats.finding import view_of
from icm_ray.errors import InputError

KOHYA = {"lora_unet_x.lora_down.weight": torch.ones(2, 5)}
KOHYA |= {"lora_unet_x.lora_up.weight": torch.ones(6, 2)}


def problems_of(path):
    with pytest.raises(InputError) as error:
        open_adapter(path)
    return error.value.problems


def save_named(name, data):
    def save(folder):
        (folder / name).write_bytes(data)

    return save


def save_tensors(name, *keys):
    return lambda folder: save_file({key: torch.ones(2, 2) for key in keys}, folder / name)


NEMO = "model.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
REFUSED = {
    "gguf": (save_named("lora.gguf", b"GGUF"), "a GGUF file", "it was made from"),
    "nemo archive": (save_named("lora.nemo", b"x"), "a NeMo archive", "Export it with NeMo"),
    "nemo tensors": (save_tensors("a.safetensors", NEMO), "NeMo's tensors", "Export it with NeMo"),
    "torchtune": (
        save_tensors("a.safetensors", "layers.0.attn.q_proj.lora_a.weight"),
        "torchtune's tensors",
        "Hugging Face checkpointer",
    ),
    "torchtune pickle": (save_named("adapter_0.pt", b"x"), "a torchtune adapter", "checkpointer"),
    "lycoris": (save_tensors("a.safetensors", "lora_unet_a.lokr_w1"), "LyCORIS's", "plain LoRA"),
    "pickle": (save_named("adapter_model.bin", b"x"), "a pickle", "allow_pickle: true"),
    "lfs": (save_named("adapter_model.safetensors", LFS), "Git LFS pointer", "git lfs pull"),
    "lfs kohya": (save_named("style.safetensors", LFS), "Git LFS pointer", "git lfs pull"),
    "lfs config": (save_named("adapter_config.json", LFS), "Git LFS pointer", "git lfs pull"),
    "old mlx": (save_named("adapters.npz", b"x"), "an MLX adapter", "adapters.safetensors"),
    "whole model": (save_tensors("model.safetensors", "lm_head.weight"), "none of them named", "."),
    "distributed": (save_named("__0_0.distcp", b"x"), "a distributed checkpoint", "Export"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named_with_the_way_on(tmp_path, case):
    save, what, way_on = REFUSED[case]
    save(tmp_path)
    if case == "lfs config":
        save_file(plain_tensors(), tmp_path / "adapter_model.safetensors")
    assert any(what in line and way_on in line for line in problems_of(tmp_path))


def test_a_nemo_checkpoint_is_named(tmp_path):
    for name in ("context", "weights"):
        (tmp_path / name).mkdir()
    assert "a NeMo checkpoint" in problems_of(tmp_path)[0]


def test_of_a_trainers_folder_the_newest_checkpoint_is_named(tmp_path):
    for step in (9, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "training_args.bin").write_bytes(b"x")
    [problem] = problems_of(tmp_path)
    assert "a trainer's folder" in problem
    assert f"Point at {tmp_path / 'checkpoint-100'}, the newest" in problem


def test_several_files_are_never_chosen_from(tmp_path):
    for name in ("a", "b"):
        save_file(KOHYA, tmp_path / f"{name}.safetensors")
    assert "2 safetensors files, such as a.safetensors" in problems_of(tmp_path)[0]


def test_a_single_file_of_a_peft_folder_is_answered_with_the_folder(make_folder):
    folder = make_folder()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        [problem] = problems_of(folder / name)
        assert f"Name {folder}." in problem


def test_looking_at_formats_imports_no_hub_client_and_no_peft(tmp_path):
    save_file(KOHYA, tmp_path / "k.safetensors")
    script = (
        "import sys; from pathlib import Path; from icm_ray.adapters.formats import view_of; "
        f"view_of(Path({str(tmp_path / 'k.safetensors')!r})); "
        "print(*{'peft', 'huggingface_hub', 'diffusers'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    assert run.stdout.split() == []


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\2\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_bytes_that_are_no_adapter_never_leave_as_another_error(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(InputError):
        view_of(tmp_path / "x.safetensors")


def test_a_header_with_odd_shapes_is_refused_by_its_shapes(tmp_path):
    header = {
        f"lora_unet_x.lora_{side}.weight": {"dtype": "F32", "shape": [], "data_offsets": at}
        for side, at in (("down", [0, 4]), ("up", [4, 8]))
    }
    raw_safetensors(tmp_path / "k.safetensors", json.dumps(header).encode(), b"\0" * 8)
    assert any("shape []" in line for line in problems_of(tmp_path / "k.safetensors"))
