"""`icm-ray export` and what comes before it: exit codes, lines to serve with, other formats."""

import pytest
import torch
from command_samples import save_lora
from safetensors.torch import save_file

from icm_ray.adapters import open_adapter


def test_a_whole_model_and_how_to_serve_it(cli, tmp_path, tiny_bert):
    adapter, out = save_lora(tmp_path / "both", rank=9), tmp_path / "whole"
    code, text, _ = cli("export", adapter, "--base", tiny_bert, "-o", out)
    assert code == 0
    assert (out / "model.safetensors").is_file()
    assert f"vllm serve {out}\n" in text
    assert f"--model-path {out}\n" in text
    served = (
        f"vllm serve {tiny_bert} --enable-lora --max-lora-rank 16 --lora-modules both={adapter}"
    )
    assert served in text
    assert f"--max-lora-rank 16 --lora-paths both={adapter}" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--format", "koya"], "Did you mean 'kohya'?"),
        ([], "--base: missing"),
    ],
)
def test_a_wrong_command_line_ends_with_2(cli, tmp_path, words, text):
    adapter = save_lora(tmp_path / "a")
    code, _, stderr = cli("export", adapter, "-o", tmp_path / "out", *words)
    assert code == 2
    assert text in stderr


def test_an_adapter_that_does_not_fit_ends_with_3(cli, tmp_path, tiny_bert):
    adapter = save_lora(tmp_path / "a", shapes={"encoder.layer.9.query": (16, 16)})
    code, _, stderr = cli("export", adapter, "--base", tiny_bert, "-o", tmp_path / "out")
    assert code == 3
    assert "a: encoder.layer.9.query: not in the base model" in stderr
    assert not (tmp_path / "out").exists()


def test_two_kohya_files_are_merged_and_exported_as_kohya(cli, tmp_path):
    names = ("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_input_blocks_1_1_proj_in")
    refs = ""
    for seed, task in enumerate(("oil", "ink")):
        draw = torch.Generator().manual_seed(seed)
        tensors = {f"{name}.alpha": torch.tensor(1.0) for name in names}
        for name in names:
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, 5, generator=draw)
            tensors[f"{name}.lora_up.weight"] = torch.randn(6, 2, generator=draw)
        save_file(tensors, tmp_path / f"{task}.safetensors")
        refs += f"  - {{name: {task}, path: {tmp_path / task}.safetensors}}\n"
    code, text, _ = cli("inspect", tmp_path / "oil.safetensors", "--json")
    assert '"format": "kohya"' in text
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"adapters:\n{refs}method: soup\noutput: {{path: {tmp_path / 'merged'}}}\n")
    assert cli("merge", "-c", recipe)[0] == 0
    assert cli("reproduce", tmp_path / "merged")[0] == 0
    code, *_ = cli("export", tmp_path / "merged", "--format", "kohya", "-o", tmp_path / "kohya")
    assert code == 0
    merged, again = open_adapter(tmp_path / "merged"), open_adapter(tmp_path / "kohya")
    assert again.fingerprint == merged.fingerprint
    assert set(again.shapes) == {"unet.mid_block.attentions.0.proj_in", names[1]}
    oil, ink = (open_adapter(tmp_path / f"{task}.safetensors") for task in ("oil", "ink"))
    for module in again.shapes:
        mean = (oil.factors(module).delta() + ink.factors(module).delta()) / 2
        assert torch.allclose(again.factors(module).delta(), mean, atol=1e-6)
