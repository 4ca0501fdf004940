"""One test for every way an adapter can be no plain LoRA: refused by name, before anything runs."""

import json
import os
import pickle
import struct

import pytest
import torch
from adapter_samples import PREFIX, plain_config, raw_safetensors

from icm_ray.adapters import load_adapter, open_adapter
from icm_ray.errors import InputError

A0, B0 = (f"{PREFIX}layers.0.q.lora_{side}.weight" for side in "AB")

CONFIGS = {
    "no peft_type": ({"peft_type": ...}, "peft_type: null but LORA is expected"),
    "ia3": ({"peft_type": "IA3"}, 'peft_type: "IA3" but LORA'),
    "adalora": ({"peft_type": "ADALORA"}, 'peft_type: "ADALORA" but LORA'),
    "loha": ({"peft_type": "LOHA"}, 'peft_type: "LOHA" but LORA'),
    "evil type": ({"peft_type": ["LORA"]}, 'peft_type: ["LORA"] but text'),
    "dora": ({"use_dora": True}, "use_dora: true but nothing is expected: DoRA"),
    "lora bias": ({"lora_bias": True}, "lora_bias: true but nothing"),
    "bias all": ({"bias": "all"}, 'bias: "all" but none is expected'),
    "bias maybe": ({"bias": "maybe"}, 'bias: "maybe" but none is expected'),
    "pissa": ({"init_lora_weights": "pissa"}, "Convert it with PEFT"),
    "pissa iterations": ({"init_lora_weights": "pissa_niter_4"}, "Convert it with PEFT"),
    "olora": ({"init_lora_weights": "OLoRA"}, "Convert it with PEFT"),
    "corda": ({"init_lora_weights": "corda"}, "Convert it with PEFT"),
    "loftq": ({"init_lora_weights": "loftq"}, "Convert it with PEFT"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "Convert it with PEFT"),
    "unknown init": ({"init_lora_weights": "magic"}, "one of gaussian, eva"),
    "tokens": ({"trainable_token_indices": [1]}, "rows of an embedding"),
    "replication": ({"layer_replication": [[0, 2]]}, "another model than the base"),
    "qalora": ({"use_qalora": True}, "QA-LoRA"),
    "alora": ({"alora_invocation_tokens": [1]}, "some tokens only"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "Arrow routes"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    "kasa": ({"kasa_config": {"a": 1}}, "KaSA"),
    "monteclora": ({"monteclora_config": {"a": 1}}, "MonteCLoRA"),
    "megatron": ({"megatron_config": {"a": 1}}, "Megatron"),
    "tying": ({"ensure_weight_tying": True}, "shares factors between layers"),
    "unknown key": ({"use_new_idea": 1}, "use_new_idea: 1 but nothing is expected"),
    "remote code": ({"trust_remote_code": True}, "its meaning is not known here"),
    "modules to save": ({"modules_to_save": ["head"]}, "Whole layers are not merged"),
    "r negative": ({"r": -1}, "r: -1 but a positive integer"),
    "r zero": ({"r": 0}, "r: 0 but a positive integer"),
    "r text": ({"r": "2"}, 'r: "2" but a positive integer'),
    "r float": ({"r": 2.5}, "r: 2.5 but a positive integer"),
    "r true": ({"r": True}, "r: true but a positive integer"),
    "r null": ({"r": None}, "r: null but a positive integer"),
    "r other": ({"r": 8}, "rank 2 but r or rank_pattern say 8"),
    "r enormous": ({"r": 10**9}, "rank 2 but r or rank_pattern say 1000000000"),
    "alpha text": ({"lora_alpha": "16"}, 'lora_alpha: "16" but a finite number'),
    "alpha true": ({"lora_alpha": True}, "lora_alpha: true but a finite number"),
    "alpha enormous": ({"lora_alpha": 10**400}, "but a finite number is expected"),
    "rslora text": ({"use_rslora": "yes"}, 'use_rslora: "yes" but true or false'),
    "targets number": ({"target_modules": 3}, "target_modules: 3 but a list of names or text"),
    "targets mixed": ({"target_modules": ["q", 3]}, "but a list of names or text"),
    "bad target regex": ({"target_modules": "*q"}, "but a valid regular expression"),
    "bad exclude regex": ({"exclude_modules": "(q"}, "but a valid regular expression"),
    "uncovered": ({"target_modules": ["q"]}, "layers.0.v: not in target_modules"),
    "rank pattern list": ({"rank_pattern": ["q"]}, 'rank_pattern: ["q"] but a table'),
    "rank pattern text": ({"rank_pattern": {"q": "4"}}, "but a table of positive integers"),
    "rank pattern rank": ({"rank_pattern": {"layers.1.q": 4}}, "layers.1.q: rank 2 but"),
    "alpha pattern null": ({"alpha_pattern": {"q": None}}, "but a table of finite numbers"),
    "bad regex": ({"rank_pattern": {"*q": 2}}, "no valid regular expression"),
    "redos rank": ({"rank_pattern": {"([a-z0-9_.]+)+!": 4}}, "could run for ever"),
    "redos alpha": ({"alpha_pattern": {"([a-z0-9_.]+)+!": 4}}, "could run for ever"),
    "redos optional": ({"rank_pattern": {".?" * 40 + "zz": 4}}, "could run for ever"),
    "redos counted": ({"alpha_pattern": {".{0,9}" * 12: 4}}, "could run for ever"),
    "bad layers regex": ({"layers_pattern": "(q"}, "but a valid regular expression"),
    "redos wildcards": ({"alpha_pattern": {".*a.*b.*c.*d!": 4}}, "could run for ever"),
    "long pattern": ({"alpha_pattern": {"q" * 501: 4}}, "501 characters long"),
    "task": ({"task_type": "COOKING"}, "PEFT refuses it (ValueError: Invalid task type"),
    "layers and regex": (
        {"target_modules": ".*", "layers_to_transform": [1]},
        "PEFT refuses it (ValueError",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_no_plain_lora(make_folder, case):
    config, text = CONFIGS[case]
    with pytest.raises(InputError) as error:
        load_adapter(make_folder(config))
    assert any(text in line for line in error.value.problems), error.value.problems
    assert all("adapter_" in line for line in error.value.problems)


TENSORS = {
    "NaN": ({A0: torch.full((2, 5), float("nan"))}, f"{A0}: NaN or infinity"),
    "infinity": ({B0: torch.full((6, 2), float("inf"))}, f"{B0}: NaN or infinity"),
    "overflow": ({B0: torch.full((6, 2), 3e38)}, f"{B0}: NaN or infinity"),
    "int8": ({A0: torch.ones(2, 5, dtype=torch.int8)}, "A: I8 but one of F16"),
    "int64": ({A0: torch.ones(2, 5, dtype=torch.int64)}, "A: I64 but one of F16"),
    "bool": ({A0: torch.ones(2, 5, dtype=torch.bool)}, "A: BOOL but one of F16"),
    "fp8": ({A0: torch.ones(2, 5).to(torch.float8_e4m3fn)}, "A: F8_E4M3 but one of F16"),
    "zero size": ({A0: torch.ones(2, 0)}, "shape [2, 0] but 2 to 5 dimensions"),
    "vector": ({A0: torch.ones(2)}, "shape [2] but 2 to 5 dimensions"),
    "three": ({A0: torch.ones(2, 5, 1)}, "A [2, 5, 1] and B [6, 2] but (rank, d_in)"),
    "ranks differ": ({A0: torch.ones(3, 5)}, "A of rank 3 and B of rank 2"),
    "transposed": ({A0: torch.ones(5, 2)}, "A of rank 5 and B of rank 2"),
    "no B": ({B0: ...}, f"{B0}: missing but its partner needs it"),
    "no A": ({A0: ...}, f"{A0}: missing but its partner needs it"),
    "no module": ({A0: ..., B0: ...}, "layers.0: no q but all other layers have it"),
    "layer 7 of 4": (
        {
            f"{PREFIX}layers.7.{leaf}.lora_{side}.weight": torch.ones(
                (2, 5) if side == "A" else (6, 2)
            )
            for leaf in "qv"
            for side in "AB"
        },
        "layers.7: follows layer 3 but the next number is expected",
    ),
    "magnitude": ({f"{PREFIX}layers.0.q.lora_magnitude_vector": torch.ones(6)}, "DoRA is no B A"),
    "extra": ({"something": torch.ones(2)}, "something: unknown but only"),
    "adapter name": (
        {f"{PREFIX}layers.0.q.lora_A.default.weight": torch.ones(2, 5)},
        "Take the adapter's name out of the key",
    ),
    "saved embedding": ({f"{PREFIX}embed_tokens.weight": torch.ones(4, 4)}, "a whole layer"),
    "too wide": (
        {A0: torch.ones(2, 2**24 + 1, dtype=torch.bfloat16)},
        "but at most 16777216 rows and columns",
    ),
    "path key": ({f"{PREFIX}../../etc.lora_A.weight": torch.ones(2, 5)}, "no module path"),
    "ansi key": ({f"{PREFIX}\x1b[31mq.lora_A.weight": torch.ones(2, 5)}, "no module path"),
    "two kinds": (
        {
            f"{PREFIX}layers.0.q.lora_embedding_A": torch.ones(2, 5),
            f"{PREFIX}layers.0.q.lora_embedding_B": torch.ones(6, 2),
        },
        "both linear and embedding factors",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_plain_lora(make_folder, case):
    tensors, text = TENSORS[case]
    with pytest.raises(InputError) as error:
        load_adapter(make_folder(tensors=tensors))
    assert any(text in line for line in error.value.problems), error.value.problems
    assert all("adapter_model.safetensors" in line for line in error.value.problems)
    assert "\x1b" not in str(error.value)


def entry(shape=(2,), start=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def header(**tensors):
    return json.dumps(tensors).encode()


WEIGHTS = {
    "empty": (b"", "in its 0 bytes but a safetensors file"),
    "short": (b"\x01\x02", "in its 2 bytes but a safetensors file"),
    "enormous header": (struct.pack("<Q", 2**63) + b"{}", "no header of at most"),
    "past the end": (struct.pack("<Q", 100) + b"{}", "in its 10 bytes but"),
    "101 MB": (struct.pack("<Q", 101_000_000) + bytes(101_000_000), "no header of at most"),
    "zip pickle": (b"PK\x03\x04" + bytes(100), "a pickle (zip)"),
    "old pickle": (pickle.dumps({"a": list(range(50))}, protocol=4), "a pickle but"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html>not found</html>", "a web page"),
    "gguf": (b"GGUF" + b"\x03" * 40, "a GGUF file"),
    "no json": (b"{secret stuff", "header: line 1: not JSON"),
    "bad utf-8": (b"{\xff\xfe}", "header: not UTF-8 JSON"),
    "a list": (b"[1, 2]", "header is no JSON object"),
    "nothing": (b"{}", "0 tensors, none of them LoRA"),
    "not lora": (header(x=entry()), "x: unknown but only"),
    "twice": (b'{"x":{"dtype":"F32"},"x":{"dtype":"F32"}}', "'x': given twice"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "many": (header(**{f"t{i}": 0 for i in range(100_000)}), "100000 tensors but at most 99999"),
    "no shape": (header(x={"dtype": "F32"}), "x: no dtype or shape"),
    "negative": (header(x=entry((-2,))), "x: no dtype or shape"),
    "overlap": (header(x=entry(), y=entry(start=4, end=12)), "damaged ("),
    "cut off": (header(x=entry((20,), end=80)), "damaged ("),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_files_that_are_no_safetensors(make_folder, case):
    content, text = WEIGHTS[case]
    file = make_folder() / "adapter_model.safetensors"
    if content[:1] in (b"{", b"["):
        raw_safetensors(file, content, b"" if case == "nothing" else bytes(8))
    else:
        file.write_bytes(content)
    with pytest.raises(InputError) as error:
        open_adapter(file.parent)
    assert any(text in line for line in error.value.problems), error.value.problems
    assert all("adapter_model.safetensors" in line for line in error.value.problems)
    assert "secret" not in str(error.value)


TEXTS = {
    "empty": (b"", "line 1: not JSON"),
    "list": (b"[]", "a list but a JSON object"),
    "utf-16": ("{}".encode("utf-16"), "not UTF-8 JSON"),
    "NaN": (b'{"lora_alpha": NaN}', "NaN but a finite number"),
    "infinity": (b'{"lora_alpha": 1e999}', "1e999 but a finite number"),
    "digits": (b'{"r": ' + b"9" * 5000 + b"}", "not UTF-8 JSON"),
    "twice": (b'{"r": 2, "r": 4}', "'r': given twice"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "8 MB": (b'{"r": "' + b"x" * 8_000_000 + b'"}', "bytes but at most 7000000"),
    "a secret": (b"root:x:0:0:secret", "line 1: not JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_configs_that_are_no_json(make_folder, case):
    content, text = TEXTS[case]
    folder = make_folder()
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        open_adapter(folder)
    assert text in str(error.value)
    assert "adapter_config.json" in str(error.value)
    assert "secret" not in str(error.value)


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_pickles_are_never_run(make_folder, tmp_path, name):
    folder = make_folder()
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(InputError, match=r"onvert.*safetensors"):
        load_adapter(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing", "missing but"),
        ("folder", "a folder but"),
        ("pipe", "a pipe, socket or device but"),
        ("loop", "cannot be opened"),
        ("dangling", "a dangling link but"),
        ("device", "a pipe, socket or device but"),
    ],
)
def test_things_that_are_no_files(make_folder, name, kind, text):
    file = make_folder() / name
    file.unlink()
    make = {
        "missing": lambda: None,
        "folder": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
        "loop": lambda: file.symlink_to(file),
        "dangling": lambda: file.symlink_to("nowhere"),
        "device": lambda: file.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.raises(InputError) as error:
        open_adapter(file.parent)
    assert text in str(error.value)
    assert name in str(error.value)


def test_paths_that_are_no_folders(make_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = make_folder() / "adapter_config.json"
    for path, text in (
        ("meta-llama/adapter", "nor in the Hugging Face cache"),
        (file, "a single file but its folder is expected"),
        ("a\0b", "folder"),
        ("x" * 5000, "folder"),
    ):
        with pytest.raises(InputError, match=text):
            open_adapter(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        open_adapter("empty")
    assert len(error.value.problems) == 2


def test_all_problems_are_told_at_once(make_folder):
    folder = make_folder(
        {"r": 0, "use_dora": True, "bias": "all"},
        {A0: torch.ones(2), f"{PREFIX}layers.1.q.lora_B.weight": ...},
    )
    with pytest.raises(InputError) as error:
        load_adapter(folder)
    assert len(error.value.problems) == 5


def test_every_bad_tensor_is_named(make_folder):
    bad = {A0: torch.full((2, 5), float("nan")), B0: torch.full((6, 2), float("inf"))}
    with pytest.raises(InputError) as error:
        load_adapter(make_folder(tensors=bad))
    assert len(error.value.problems) == 2


def test_grouped_convolutions_are_told_apart(make_peft):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    import warnings

    from peft import LoraConfig, get_peft_model

    folder, _ = make_peft("conv", r=2, target_modules=["1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        wrapped.save_pretrained(str(folder))
    with pytest.raises(InputError, match="Grouped convolutions"):
        open_adapter(folder)


@pytest.mark.timeout(30)
def test_too_many_patterns_are_refused_in_time(make_folder):
    patterns = {f".*layers.*{i}.*q": 2 for i in range(2000)}
    tensors = {
        f"{PREFIX}{'deep.' * 20}layers.{i}.q.lora_{side}.weight": torch.ones(
            (2, 5) if side == "A" else (6, 2)
        )
        for i in range(100)
        for side in "AB"
    }
    with pytest.raises(InputError, match="2000 regular expressions, of which 1000"):
        open_adapter(make_folder({"rank_pattern": patterns}, tensors))


def test_the_plain_config_itself_is_accepted(make_folder):
    assert open_adapter(make_folder()).config == plain_config()
