"""Class: base models that bring code, lack parts, or are damaged."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from command_samples import recipe_of, save_lora
from corpus_cases import CANARY, SECRET, Case, every, hold_command
from safetensors.torch import load_file, save_file
from test_corpus_files import Bomb

WEIGHTS, CONFIG = "base/model.safetensors", "base/config.json"
EXPLODE = f"open({CANARY!r}, 'w')\n"


def case(code: int, word: str, spoil: Callable[[Path], object], names: str = "base") -> Case:
    return Case(spoil, code, word, names)


def keys(file: str, **changes: object):
    """Return what changes keys of a JSON file."""

    def spoil(base: Path) -> None:
        path = base / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **changes}))

    return spoil


def content(name: str, data: bytes):
    return lambda base: (base / name).write_bytes(data)


def cut(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_nan(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def without(name: str):
    return lambda base: (base / name).unlink()


def pickle_only(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def sharded(place: str):
    """Return what names a place for every tensor in an index."""

    def spoil(base: Path) -> None:
        names = load_file(base / "model.safetensors")
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def code_of_a_model(base: Path) -> None:
    """A config that asks transformers for code beside it."""
    (base / "modeling_evil.py").write_text(EXPLODE)
    names = {"AutoConfig": "modeling_evil.C", "AutoModel": "modeling_evil.M"}
    keys("config.json", auto_map=names)(base)


def code_of_an_unknown_model(base: Path) -> None:
    code_of_a_model(base)
    keys("config.json", model_type="evil")(base)


def code_of_a_tokenizer(base: Path) -> None:
    (base / "tokenization_evil.py").write_text(EXPLODE)
    names = {"AutoTokenizer": ["tokenization_evil.T", None]}
    keys("tokenizer_config.json", auto_map=names, tokenizer_class="T")(base)


LOOP = "{% for i in range(1000000000) %}x{% endfor %}"
CASES = {
    "base_custom_code": case(0, "", code_of_a_model),
    "base_unknown_with_code": case(
        3, "no config of a known model", code_of_an_unknown_model, CONFIG
    ),
    "base_tokenizer_code": case(0, "", code_of_a_tokenizer),
    "base_chat_template": case(0, "", keys("tokenizer_config.json", chat_template=LOOP)),
    "base_pickle_only": case(3, "weights only as pytorch_model.bin", pickle_only),
    "base_cut": case(3, "damaged (", cut, WEIGHTS),
    "base_empty": case(3, "in its 0 bytes", content("model.safetensors", b""), WEIGHTS),
    "base_header_2_63": case(
        3, "no header of at most", content("model.safetensors", struct.pack("<Q", 2**63)), WEIGHTS
    ),
    "base_nan": case(3, "NaN or infinity", with_nan),
    "base_no_config": case(3, "config.json", without("config.json")),
    "base_secret_config": case(3, "not JSON", content("config.json", SECRET.encode()), CONFIG),
    "base_other_sizes": case(3, "query", keys("config.json", hidden_size=32)),
    "base_index_outside": case(3, "weight_map", sharded("../secret"), "base"),
    "base_index_absolute": case(3, "weight_map", sharded("/etc/passwd"), "base"),
    "base_no_folder": case(3, "base", shutil.rmtree, "base"),
}


@pytest.mark.timeout(60)
@every(CASES)
def test_bases(case, tiny_bert, tmp_path, monkeypatch):
    from transformers.utils import logging

    # As the command's own environment does before transformers is imported.
    monkeypatch.setattr(logging, "_tqdm_active", False)
    monkeypatch.setattr(logging.get_logger("transformers"), "disabled", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text(SECRET)
    case.spoil(Path(shutil.copytree(tiny_bert, tmp_path / "base")))
    folders = {name: save_lora(tmp_path / name, seed) for seed, name in enumerate("ab")}
    recipe = recipe_of(tmp_path / "r.yaml", folders, base=str(tmp_path / "base"))
    hold_command(["merge", "-c", str(recipe)], case, tmp_path)
