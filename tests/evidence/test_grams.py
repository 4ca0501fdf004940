"""Gram statistics of module inputs beside sums made by hand."""

import pytest
import torch

from icm_ray.base_model.loading import load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.errors import ResourceError
from icm_ray.evidence import grams
from icm_ray.evidence.gram_files import GramOrder, join_parts
from icm_ray.evidence.grams import gather_grams, gather_parts
from icm_ray.evidence.tensors import Evidence, read_evidence
from icm_ray.linalg.gram import GRAM_KINDS
from icm_ray.methods.shared.grams import grams_of
from icm_ray.types import ModuleContext

Q, K, OUT = (
    f"encoder.layer.1.attention.{name}" for name in ("self.query", "self.key", "output.dense")
)


@pytest.fixture(scope="module")
def bert(tiny_bert):
    return load_base(tiny_bert)


@pytest.fixture
def adapter(make_adapter):
    return make_adapter("law", shapes={Q: (16, 16), OUT: (16, 16)}, spread=0.2)


def inputs_of(bert, adapter, texts, module: str) -> torch.Tensor:
    """Every row of a module's input, one text at a time, so that nothing is padded."""
    rows = []
    hook = bert.model.get_submodule(module).register_forward_pre_hook(
        lambda _module, given: rows.append(given[0][0])
    )
    with torch.no_grad(), applied(bert.model, adapter):
        for ids in tokenize(bert.tokenizer, texts, 32):
            bert.model(input_ids=torch.tensor([ids]))
    hook.remove()
    return torch.cat(rows).double()


def test_grams_are_means_over_real_tokens_of_the_expert(bert, adapter, texts) -> None:
    ids = tokenize(bert.tokenizer, texts, 32)
    batches = make_batches(ids, 7, 0)
    assert any(not batch.mask.all() for batch in batches)
    found = gather_grams(bert.model, adapter, [K, OUT, Q, "embeddings.word_embeddings"], batches)
    assert found.shared == {Q: Q, K: Q, OUT: OUT}, "one Gram for one input, none for embeddings"
    assert found.inputs == len(texts)
    for module in (Q, OUT):
        x = inputs_of(bert, adapter, texts, module)
        assert found.rows[module] == len(x)
        expected = x.T @ x / len(x)
        torch.testing.assert_close(found.grams[module].square(), expected, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_without_hooks(bert, adapter, texts) -> None:
    batches = make_batches(tokenize(bert.tokenizer, texts, 32), 8, 0)
    gather_grams(bert.model, adapter, [Q], batches)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in bert.model.modules())


def order_of(scratch, modules=(K, OUT, Q), directions=None) -> GramOrder:
    return GramOrder(modules, directions, scratch, "k")


@pytest.fixture
def gathered(bert, adapter, texts, tmp_path):
    """What gathers parts into a folder, and joins them."""
    batches = make_batches(tokenize(bert.tokenizer, texts, 32), 8, 0)

    def gather(name: str, **how) -> Evidence:
        order = order_of(tmp_path / f".{name}", **how)
        gather_parts(bert.model, adapter, batches, order)
        join_parts(order, ["law"], tmp_path / name, {"key": "k"})
        return read_evidence(tmp_path / name)

    return gather


def test_sums_without_room_wait_for_another_pass(gathered, tmp_path, monkeypatch) -> None:
    whole = gathered("whole")
    monkeypatch.setattr(grams, "SUM_ENTRIES", 16 * 17 // 2)
    parts = gathered("parts")
    assert len(list((tmp_path / ".whole" / "law").iterdir())) == 1
    assert len(list((tmp_path / ".parts" / "law").iterdir())) == 2
    assert parts.identity == whole.identity
    assert parts.shared["law"] == {Q: Q, K: Q, OUT: OUT}
    assert parts.described["rows"]["law"].keys() == {Q, OUT}
    assert {x.shape for x in parts.of(K, ["gram.<task>"], ["law"]).values()} == {(16 * 17 // 2,)}


def test_parts_that_are_whole_are_kept(gathered, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(grams, "SUM_ENTRIES", 1)
    first, law = gathered("out"), tmp_path / ".out" / "law"
    seals = {p.name: (p / "manifest.json").stat().st_ino for p in law.iterdir()}
    (law / "0001" / "evidence.safetensors").write_bytes(b"cut off")
    assert gathered("out").identity == first.identity
    found = {p.name: (p / "manifest.json").stat().st_ino for p in law.iterdir()}
    assert found["0000"] == seals["0000"]
    assert found["0001"] != seals["0001"]


def test_parts_that_nobody_sees_are_missed(tmp_path) -> None:
    with pytest.raises(ResourceError, match=r"no Gram statistics of law.* every node sees"):
        join_parts(order_of(tmp_path / "none"), ["law"], tmp_path / "out", {})


@pytest.mark.parametrize(
    ("directions", "kinds"), [(0, {"gram_diagonal"}), (3, set(GRAM_KINDS[1:]))]
)
def test_less_than_the_whole_keeps_its_diagonal(gathered, directions, kinds) -> None:
    every = [f"{kind}.<task>" for kind in GRAM_KINDS]
    whole = gathered("whole").of(OUT, every, ["law"])
    less = gathered("less", directions=directions).of(OUT, every, ["law"])
    assert set(less) == {f"{kind}.law" for kind in kinds}
    about = ModuleContext("m", ("law",), ("law",))
    one, other = (grams_of(16, about, told)["law"] for told in (whole, less))
    torch.testing.assert_close(other.energies(), one.energies(), rtol=1e-5, atol=1e-6)
