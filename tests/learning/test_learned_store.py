"""Learned merges on disk: exact, whole, and only for the adapters they came from."""

import pytest
import torch
from learning_samples import rebuilt

from icm_ray.errors import InputError
from icm_ray.evidence.learned import LearnedMerge, load_learned, save_learned
from icm_ray.evidence.tensors import write_evidence
from icm_ray.files import MANIFEST
from icm_ray.learning.parameters import CoreMatrices
from icm_ray.learning.terms import summed, tsv_terms
from icm_ray.merging.merge import merge


@pytest.fixture
def learned(terms, adapters) -> LearnedMerge:
    parameters = CoreMatrices(terms.with_residual(summed(tsv_terms(terms), 0.7)), 0.0)
    return LearnedMerge(
        parameters.learned(),
        terms.tasks,
        {adapter.name: adapter.fingerprint for adapter in adapters},
        {"objective": "row_space_match"},
        {"losses": {"law": {"start": [1.0], "end": [0.5]}}},
    )


def test_it_comes_back_exactly(learned, adapters, tmp_path) -> None:
    save_learned(learned, tmp_path / "learned", {"key": "k"})
    again = load_learned(tmp_path / "learned")
    assert again.tensors.keys() == learned.tensors.keys()
    assert all(torch.equal(again.tensors[name], t) for name, t in learned.tensors.items())
    assert (again.tasks, again.adapters) == (learned.tasks, learned.adapters)
    assert (again.origin, again.report) == (learned.origin, learned.report)
    for module, factors in rebuilt(learned, adapters).items():
        assert torch.equal(rebuilt(again, adapters)[module].b, factors.b)


def test_the_same_result_gives_the_same_bytes(learned, tmp_path) -> None:
    for name in ("one", "two"):
        save_learned(learned, tmp_path / name)
    assert (tmp_path / "one" / MANIFEST).read_bytes() == (tmp_path / "two" / MANIFEST).read_bytes()


def test_other_adapters_are_refused(learned, adapters, make_adapter, tmp_path) -> None:
    save_learned(learned, tmp_path / "learned")
    with pytest.raises(InputError, match="learned with med too"):
        merge(adapters[:2], "nsc", evidence=tmp_path / "learned")
    shapes = {module: factors.shape for module, factors in adapters[1].modules.items()}
    stranger = make_adapter("law", seed=99, shapes=shapes)
    with pytest.raises(InputError, match="of another adapter than 'law' given here"):
        merge([adapters[0], stranger, adapters[2]], "nsc", evidence=tmp_path / "learned")


def test_changed_or_foreign_folders_are_refused(learned, tmp_path) -> None:
    save_learned(learned, tmp_path / "learned")
    content = bytearray((tmp_path / "learned" / "evidence.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "learned" / "evidence.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="sha256 differs"):
        load_learned(tmp_path / "learned")
    write_evidence(tmp_path / "grams", "gram_statistics", {"m.gram.a": torch.eye(2)}, adapters={})
    with pytest.raises(InputError, match="gram_statistics but learned_merge is expected"):
        load_learned(tmp_path / "grams")
