"""docs/first_session.md, typed command by command: every output is the one that is shown."""

import json
import re
import shlex
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PAGE = Path(__file__).parents[1] / "docs" / "first_session.md"
WEIGHTS = "adapter_model.safetensors"
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def make_base(folder: Path) -> None:
    """Save a tiny LLaVA; transformers writes it under the names of before 4.52."""
    import transformers as hf

    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(**TEXT, intermediate_size=24, image_size=8, patch_size=4)
    text = hf.LlamaConfig(**TEXT, intermediate_size=24, vocab_size=32)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=30)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    assert any(
        key.startswith("language_model.model") for key in load_file(next(folder.glob("*.s*")))
    )


def make_adapters(folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)

    def pair(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, 16, generator=draw), torch.randn(16, rank, generator=draw) / 8

    mlx, peft = {}, {}
    for layer in range(2):
        for leaf in ("q_proj", "v_proj"):
            a, b = pair(4)
            name = f"language_model.model.layers.{layer}.self_attn.{leaf}"
            mlx |= {f"{name}.lora_a": a.T.contiguous(), f"{name}.lora_b": b.T.contiguous()}
            a, b = pair(8)
            name = f"base_model.model.model.language_model.layers.{layer}.self_attn.{leaf}"
            peft |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    (folder / "support").mkdir(parents=True)
    (folder / "legal").mkdir()
    save_file(mlx, folder / "support" / "adapters.safetensors", metadata={"format": "mlx"})
    save_file(peft, folder / "legal" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"fine_tune_type": "lora", "model": "mlx-community/llava-1.5-7b-4bit"}
    config["lora_parameters"] = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    (folder / "support" / "adapter_config.json").write_text(json.dumps(config))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "legal" / "adapter_config.json").write_text(json.dumps(config))


def session() -> list[tuple[str, str]]:
    """Return the page's commands with the outputs it shows, in order."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        for part in block.split("$ ")[1:]:
            command, _, shown = part.partition("\n")
            found.append((command, shown))
    return found


def differences(shown: str, told: str) -> list[tuple[str, str]]:
    """Return lines that are not as shown; three dots stand for anything, blanks do not count."""
    lines = [[x.rstrip() for x in text.splitlines() if x.strip()] for text in (shown, told)]
    return [
        (page, line)
        for page, line in zip_longest(*lines, fillvalue="")
        if not re.fullmatch(re.escape(page).replace(r"\.\.\.", ".*"), line)
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_command_shows_what_the_page_says(cli, tmp_path, monkeypatch, request) -> None:
    from transformers.utils import logging

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    logging.disable_progress_bar()  # as the program does before it imports anything
    request.addfinalizer(logging.enable_progress_bar)
    make_base(tmp_path / "llava")
    make_adapters(tmp_path / "adapters")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "both.yaml").write_text(recipe)
    for command, shown in session():
        program, *words = shlex.split(command)
        assert program == "icm-ray"
        code, stdout, stderr = cli(*words)
        assert code == (3 if "\nerror: " in shown else 0), stderr
        assert not differences(shown, stdout + stderr), command


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tower_with_layers_of_the_same_names_stays_as_it_is(cli, tmp_path) -> None:
    make_base(tmp_path / "llava")
    make_adapters(tmp_path / "adapters")
    order = ("merge", tmp_path / "adapters" / "legal", "--method", "soup", "-o")
    assert cli(*order, tmp_path / "alone")[0] == 0
    assert cli("verify", tmp_path / "alone", "--base", tmp_path / "llava")[0] == 0
    # With the base at hand, the names select what is changed and nothing else.
    assert cli(*order, tmp_path / "based", f"base={tmp_path / 'llava'}")[0] == 0
    targets = json.loads((tmp_path / "based" / "adapter_config.json").read_text())["target_modules"]
    assert all(name.startswith("model.language_model.layers.") for name in targets)
    assert cli("reproduce", tmp_path / "based")[0] == 0
    assert cli("reproduce", tmp_path / "alone")[0] == 0
    assert (
        load_file(tmp_path / "based" / WEIGHTS).keys()
        == load_file(tmp_path / "alone" / WEIGHTS).keys()
    )
