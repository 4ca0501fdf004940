"""Evidence on disk: comes back as it was, and only for the adapters it was made from."""

from pathlib import Path

import pytest
import torch

from icm_ray.errors import InputError
from icm_ray.evidence.gather import AdapterEvidence
from icm_ray.evidence.store import load_evidence, save_evidence
from icm_ray.files import MANIFEST, read_json, read_manifest, whole_folder, write_json


def evidence(task: str, seed: int) -> AdapterEvidence:
    draw = torch.Generator().manual_seed(seed)
    ratios = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
    return AdapterEvidence(
        task,
        f"print of {task}",
        torch.randn(5, generator=draw),
        {"m.1": ratios[0], "m.0": ratios[1]},
        {"m.0": ratios[2], "m.1": ratios[3]},
        inputs=7,
    )


GATHERED = [evidence("b", 1), evidence("a", 2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_evidence(tmp_path / "evidence", GATHERED, {"key": "k", "base": "tiny"})
    return tmp_path / "evidence"


def test_evidence_comes_back_exactly(folder) -> None:
    vectors, ratios = load_evidence(folder)
    for item in GATHERED:
        assert torch.equal(vectors.vectors[item.task], item.task_vector)
        assert ratios.expert[item.task] == item.expert_ratios
        assert ratios.base[item.task] == item.base_ratios
        assert vectors.adapters[item.task] == ratios.adapters[item.task] == item.fingerprint
    assert read_manifest(folder)["base"] == "tiny"
    assert read_json(folder / "evidence.json")["inputs"] == {"a": 7, "b": 7}


def test_the_same_evidence_gives_the_same_bytes(folder, tmp_path: Path) -> None:
    save_evidence(tmp_path / "again", GATHERED[::-1], {"key": "k", "base": "tiny"})
    assert (folder / MANIFEST).read_bytes() == (tmp_path / "again" / MANIFEST).read_bytes()


def test_evidence_of_other_adapters_is_refused(folder) -> None:
    load_evidence(folder, {"a": "print of a"})
    with pytest.raises(InputError, match=r"evidence of other adapters than given for a, c\."):
        load_evidence(folder, {"a": "print of another", "b": "print of b", "c": "print of c"})


def test_changed_or_foreign_folders_are_refused(folder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_evidence(tmp_path)
    with whole_folder(tmp_path / "later") as later:
        write_json(later / "evidence.json", {"format": 2})
    with pytest.raises(InputError, match="format 2 but 1 is expected"):
        load_evidence(tmp_path / "later")
    content = bytearray((folder / "evidence.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "evidence.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="sha256 differs"):
        load_evidence(folder)


def test_an_adapter_without_ratios_can_be_stored(tmp_path: Path) -> None:
    bare = AdapterEvidence("a", "print", torch.zeros(3), {}, {}, 1)
    save_evidence(tmp_path / "e", [bare], {})
    assert load_evidence(tmp_path / "e")[1].expert == {"a": {}}
