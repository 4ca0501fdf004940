"""Evidence as methods see it: from memory, from a file, from a stamped folder."""

import pytest
import torch
from safetensors.torch import save_file

from icm_ray.errors import InputError
from icm_ray.evidence.tensors import as_evidence, read_evidence, write_evidence

TENSORS = {
    "l.0.gram.law": torch.eye(2),
    "l.0.gram.a.b": torch.ones(2, 2),
    "l.0.init_idx": torch.tensor([1, 2]),
    "l.0.deeper.gram.law": torch.zeros(3, 3),
}


def test_tensors_by_name_give_each_module_its_own() -> None:
    told = as_evidence(TENSORS)
    found = told.of("l.0", ["gram.<task>", "init_idx", "mask.<task>"], ("a.b", "law", "other"))
    assert set(found) == {"gram.law", "gram.a.b", "init_idx"}
    assert torch.equal(found["gram.law"], torch.eye(2))
    assert told.of("l.9", ["gram.<task>"], ("law",)) == {}


def test_a_file_gives_the_same_as_memory(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    told = as_evidence(tmp_path / "x.safetensors")
    found = told.of("l.0", ["gram.<task>"], ("law",))
    assert torch.equal(found["gram.law"], TENSORS["l.0.gram.law"])
    assert len(told.identity) == 64


def test_identity_is_that_of_the_values() -> None:
    same = as_evidence({name: tensor.clone() for name, tensor in TENSORS.items()})
    other = as_evidence({**TENSORS, "l.0.init_idx": torch.tensor([1, 3])})
    assert as_evidence(TENSORS).identity == same.identity != other.identity


def test_a_folder_is_stamped_and_shares_tensors(tmp_path) -> None:
    folder = tmp_path / "grams"
    write_evidence(
        folder,
        "gram_statistics",
        {"l.0.q.gram.law": torch.eye(2)},
        adapters={"law": "f" * 64},
        shared={"law": {"l.0.q": "l.0.q", "l.0.k": "l.0.q"}},
    )
    told = read_evidence(folder)
    assert (told.kind, told.adapters) == ("gram_statistics", {"law": "f" * 64})
    for module in ("l.0.q", "l.0.k"):
        assert torch.equal(told.of(module, ["gram.<task>"], ("law",))["gram.law"], torch.eye(2))
    (folder / "evidence.json").write_text("{}")
    with pytest.raises(InputError, match="sha256 differs"):
        read_evidence(folder)


@pytest.mark.parametrize("wrong", [3, ["x"], {"x": [1.0]}, {1: torch.ones(1)}])
def test_anything_else_is_refused(wrong) -> None:
    with pytest.raises(InputError, match="a path or tensors by name"):
        as_evidence(wrong)


def test_broken_files_are_named(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"x\.safetensors: not a readable safetensors file"):
        as_evidence(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no such file"):
        as_evidence(tmp_path / "missing")
