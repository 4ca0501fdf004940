"""Gram statistics by the adapter actors, and the merges that need them."""

import json

import pytest
import torch
from ray_samples import hashes, write_yaml
from typer.testing import CliRunner

from icm_ray.adapters import load_adapter
from icm_ray.adapters.saving import as_stored
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.cli import app
from icm_ray.command import run_job
from icm_ray.config import EvidenceRecipe, MergeRecipe
from icm_ray.errors import InputError
from icm_ray.evidence.grams import gather_grams
from icm_ray.evidence.overlap import input_overlap
from icm_ray.evidence.tensors import read_evidence
from icm_ray.merging.merge import merge
from jobs.evidence import work as evidence_work
from jobs.merge import work as merge_work

SMALL = {"workers": 2, "cpus_per_worker": 0.5}
TEXTS = ("abc de", "fgh", "i j k l m", "nop qrs tuv")


@pytest.fixture(scope="module")
def content(adapters, tiny_bert, tmp_path_factory):
    """What a recipe says of three adapters and texts of their own."""
    data = tmp_path_factory.mktemp("data")
    for number, (name, _) in enumerate(adapters[:3]):
        lines = [json.dumps({"text": f"{text} {name[-1]}{number}"}) for text in TEXTS]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        "adapters": [{"name": name, "path": str(path)} for name, path in adapters[:3]],
        "base": str(tiny_bert),
        "data": {"path": str(data), "inputs_per_task": 4},
        "resources": SMALL,
    }


@pytest.fixture
def recipe(content, tmp_path):
    """A recipe of RegMean."""
    merged = {"method": "regmean", "output": {"path": str(tmp_path / "merged")}}
    return write_yaml(tmp_path / "regmean.yaml", {**content, **merged})


@pytest.fixture(scope="module")
def grams(content, ray_session, tmp_path_factory):
    """What jobs.evidence gathers of the same adapters and data."""
    folder = tmp_path_factory.mktemp("evidence") / "grams"
    whole = {**content, "kind": "gram_statistics", "output": str(folder)}
    path = write_yaml(folder.with_suffix(".yaml"), whole)
    assert run_job(EvidenceRecipe, evidence_work, "", ["-c", str(path)]) == 0
    return folder


def test_actors_gather_what_one_process_does(grams, adapters, tiny_bert, one_thread):
    told = read_evidence(grams)
    names = sorted(name for name, _ in adapters[:3])
    assert told.described["overlap"] == input_overlap(told, names)
    assert list(told.described["overlap"]) == names
    base = load_base(tiny_bert)
    modules = sorted({m for _, path in adapters[:3] for m in load_adapter(path).modules})
    for number, (name, path) in enumerate(adapters[:3]):
        texts = [f"{text} {name[-1]}{number}" for text in TEXTS]
        batches = make_batches(tokenize(base.tokenizer, texts, 128), 32, 0)
        expected = gather_grams(base.model, load_adapter(path, name), modules, batches)
        assert told.adapters[name] == expected.fingerprint
        assert dict(told.shared[name]) == dict(expected.shared)
        for module in modules:
            found = told.of(module, ["gram.<task>"], (name,))[f"gram.{name}"]
            assert torch.equal(found, expected.grams[expected.shared[module]].whole)


def test_they_are_gathered_again_through_the_first_merge(
    content, grams, adapters, tiny_bert, tmp_path, one_thread
):
    folder = tmp_path / "again"
    whole = {**content, "kind": "gram_statistics", "again": True, "output": str(folder)}
    path = write_yaml(tmp_path / "again.yaml", whole)
    assert run_job(EvidenceRecipe, evidence_work, "", ["-c", str(path)]) == 0
    assert hashes(tmp_path / "again.first") == hashes(grams)
    files = [load_adapter(path, name) for name, path in adapters[:3]]
    carried = as_stored(merge(files, "regmean", evidence=grams).adapter)
    base, told = load_base(tiny_bert), read_evidence(folder)
    for number, one in enumerate(files):
        texts = [f"{text} {one.name[-1]}{number}" for text in TEXTS]
        batches = make_batches(tokenize(base.tokenizer, texts, 128), 32, 0)
        expected = gather_grams(base.model, carried, sorted(carried.modules), batches)
        assert told.adapters[one.name] == one.fingerprint, "for a merge of the experts"
        for module in carried.modules:
            found = told.of(module, ["gram.<task>"], (one.name,))[f"gram.{one.name}"]
            torch.testing.assert_close(found, expected.grams[expected.shared[module]].whole)
    assert merge(files, "regmean", evidence=folder).report.evidence == told.identity


@pytest.mark.slow
def test_a_merge_gathers_what_it_needs_and_comes_out_the_same_again(recipe, grams, tmp_path):
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(recipe)]) == 0
    merged, evidence = tmp_path / "merged", tmp_path / "merged.evidence"
    assert read_evidence(evidence).kind == "gram_statistics"
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["evidence"] == read_evidence(evidence).identity
    done = CliRunner().invoke(app, ["reproduce", str(merged)])
    assert done.exit_code == 0, done.output
    before = hashes(merged)
    assert hashes(grams) == hashes(evidence)
    # Ready evidence needs no Ray, and gives the same bytes.
    words = ["-c", str(recipe), "data=null", f"evidence={grams}", f"output.path={tmp_path / 'two'}"]
    done = CliRunner().invoke(app, ["merge", *words])
    assert done.exit_code == 0, done.output
    again = hashes(tmp_path / "two")
    assert again["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    (evidence / "evidence.json").unlink()
    done = CliRunner().invoke(app, ["reproduce", str(merged)])
    assert done.exit_code == 3


@pytest.mark.slow
def test_a_merge_gathers_less_than_the_whole(recipe, adapters, tmp_path):
    args = ["-c", str(recipe), "resources.grams=low_rank:2"]
    assert run_job(MergeRecipe, merge_work, "", args) == 0
    evidence = tmp_path / "merged.evidence"
    kinds = {name.split(".")[-2] for name in read_evidence(evidence).names}
    assert kinds == {"gram_root", "gram_diagonal"}
    files = [load_adapter(path, name) for name, path in adapters[:3]]
    expected = merge(files, "regmean", evidence=evidence).adapter
    assert load_adapter(tmp_path / "merged").fingerprint == as_stored(expected).fingerprint
    assert not list(tmp_path.glob(".*gathering*"))


@pytest.mark.slow
def test_an_adapter_that_comes_later_brings_its_own_and_finds_the_others(
    ray_session, content, grams, tmp_path
):
    *earlier, last = content["adapters"]
    plain = {**content, "method": "regmean"}
    first = {**plain, "adapters": earlier, "keep_factors": True, "output": str(tmp_path / "two")}
    path = write_yaml(tmp_path / "first.yaml", first)
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(path)]) == 0
    later = {"earlier": str(tmp_path / "two"), "adapters": [last], "output": str(tmp_path / "all")}
    later |= {key: content[key] for key in ("base", "data", "resources")}
    path = write_yaml(tmp_path / "later.yaml", later)
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(path)]) == 0
    whole = {**plain, "evidence": str(grams), "data": None, "output": str(tmp_path / "at_once")}
    path = write_yaml(tmp_path / "whole.yaml", whole)
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(path)]) == 0
    name = "adapter_model.safetensors"
    assert hashes(tmp_path / "all")[name] == hashes(tmp_path / "at_once")[name]
    assert not list(tmp_path.glob("*.new"))


def test_grams_of_many_serve_any_of_them(grams, adapters):
    two = [load_adapter(path, name) for name, path in adapters[:2]]
    found = merge(two, "regmean", evidence=grams)
    by_hand = {
        f"{module}.{name}": tensor
        for module in found.adapter.modules
        for name, tensor in read_evidence(grams)
        .of(module, ["gram.<task>"], ("task0", "task1"))
        .items()
    }
    expected = merge(two, "regmean", evidence=by_hand)
    assert found.adapter.fingerprint == expected.adapter.fingerprint
    soup = merge(two, "soup")
    assert found.adapter.fingerprint != soup.adapter.fingerprint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data=null"], "evidence: missing but method 'regmean' needs gram_statistics"),
        (["base=null"], "base: missing but data are run through it"),
        (["method=nsc", "evidence=somewhere"], "data, evidence: both named"),
        (["method=soup"], "data: method 'soup' gathers none"),
        (
            ["method=soup", "data=null", "resources.grams=diagonal"],
            "resources.grams: diagonal but none are gathered without data",
        ),
        (["method=nsc", "resources.grams=diagonal"], "diagonal but learning starts from none"),
    ],
)
def test_wrong_sources_are_named_before_any_work(recipe, tmp_path, capsys, changes, words):
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(recipe), *changes]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_without_ray_data_cannot_be_gathered(recipe):
    done = CliRunner().invoke(app, ["merge", "-c", str(recipe)])
    assert done.exit_code == 2
    done = CliRunner().invoke(app, ["plan", "-c", str(recipe)])
    assert done.exit_code == 0, done.output
    assert "gathered from 4 unlabelled" in done.output.replace("\n", " ")


def test_evidence_of_other_adapters_is_refused(grams, adapters):
    other = [load_adapter(adapters[n + 1][1], adapters[n][0]) for n in range(2)]
    with pytest.raises(InputError, match="of another adapter than 'task0'"):
        merge(other, "regmean", evidence=grams)
