"""Adapters added to and removed from an earlier merge, whose own copies are all that is left."""

import json
import shutil

import pytest
import torch
import yaml
from command_samples import SHAPES, recipe_of, save_lora
from safetensors.torch import load_file, save_file

from icm_ray.adapters import open_all
from icm_ray.errors import InputError
from icm_ray.evidence.gram_files import join_grams
from icm_ray.evidence.tensors import read_evidence, write_evidence
from icm_ray.files import read_json, sha256_of_file
from icm_ray.merging.proof import reproduce, verify_folder

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def three(tmp_path):
    return {
        name: save_lora(tmp_path / name, i, rank=i + 2, dtype=torch.bfloat16)
        for i, name in enumerate("abc")
    }


def besides_cuts(err: str) -> list[str]:
    """Return what was said of anything but a cut; random adapters have flat spectra."""
    return [line for line in err.splitlines() if "the cut kept" not in line]


def kept(cli, tmp_path, folders, *, silent=True, **keys):
    """Merge folders with their factors kept, lose them, and return the merge."""
    recipe = recipe_of(tmp_path / "first.yaml", folders, keep_factors=True, **keys)
    code, _, err = cli("merge", "-c", recipe)
    assert code == 0, err
    assert not (silent and besides_cuts(err))
    for folder in folders.values():
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    return tmp_path / "merged"


def at_once(cli, tmp_path, folders, **keys):
    """Return the merge of folders by themselves."""
    output = {"path": str(tmp_path / "at_once"), **keys.pop("output", {})}
    recipe = recipe_of(tmp_path / "once.yaml", folders, output=output, **keys)
    assert cli("merge", "-c", recipe)[0] == 0
    return tmp_path / "at_once"


def same(one, other):
    assert sha256_of_file(one / WEIGHTS) == sha256_of_file(other / WEIGHTS)
    assert read_json(one / "merge_report.json") == read_json(other / "merge_report.json")


@pytest.mark.parametrize("method", ["soup", "ties", "svd", "tsv"])
def test_removed_is_as_if_it_had_never_been_there(cli, tmp_path, three, method):
    expected = at_once(cli, tmp_path, {name: three[name] for name in "ac"}, method=method)
    merged = kept(cli, tmp_path, three, method=method)
    code, _, err = cli("merge", "--from", merged, "--remove", "b", "-o", tmp_path / "later")
    assert (code, besides_cuts(err)) == (0, [])
    same(tmp_path / "later", expected)
    verify_folder(tmp_path / "later")
    assert reproduce(tmp_path / "later")


def test_steps_around_a_method_are_kept_and_made_again(cli, tmp_path, three):
    params = {"restore_norm": True, "calibrate": "measured", "scale_last": 0.5}
    expected = at_once(cli, tmp_path, {name: three[name] for name in "ac"}, params=params)
    merged = kept(cli, tmp_path, three, params=params)
    code, _, err = cli("merge", "--from", merged, "--remove", "b", "-o", tmp_path / "later")
    assert (code, besides_cuts(err)) == (0, [])
    same(tmp_path / "later", expected)
    assert params.items() <= read_json(tmp_path / "later/merge_report.json")["params"].items()
    assert reproduce(tmp_path / "later")


def test_added_is_as_if_it_had_always_been_there(cli, tmp_path, three):
    output = {"rank": 3, "dtype": "float16"}
    params = {"density": 0.4}
    expected = at_once(cli, tmp_path, three, method="ties", params=params, output=output)
    first = {name: three[name] for name in "ab"}
    output |= {"path": str(tmp_path / "merged")}
    merged = kept(cli, tmp_path, first, method="ties", params=params, output=output, seed=3)
    code, _, err = cli("merge", "--from", merged, three["c"], "-o", tmp_path / "later", "seed=0")
    assert (code, besides_cuts(err)) == (0, [])
    same(tmp_path / "later", expected)


def test_from_one_to_the_next(cli, tmp_path, three):
    expected = at_once(cli, tmp_path, {"c": three["c"]})
    merged = kept(cli, tmp_path, {name: three[name] for name in "ab"})
    steps = [
        ("--from", merged, three["c"], "-o", tmp_path / "abc", "keep_factors=true"),
        ("--from", tmp_path / "abc", "--remove", "a", "-o", tmp_path / "bc", "keep_factors=true"),
        ("--from", tmp_path / "bc", "--remove", "b", "-o", tmp_path / "later"),
    ]
    for step in steps:
        assert cli("merge", *step)[0] == 0
    same(tmp_path / "later", expected)


def test_a_recipe_says_the_same(cli, tmp_path, three):
    expected = at_once(cli, tmp_path, {name: three[name] for name in "bc"})
    merged = kept(cli, tmp_path, {name: three[name] for name in "ab"})
    recipe = tmp_path / "later.yaml"
    content = {"earlier": str(merged), "remove": ["a"], "adapters": [str(three["c"])]}
    recipe.write_text(yaml.safe_dump({**content, "output": str(tmp_path / "later")}))
    code, out, _ = cli("plan", "-c", recipe)
    assert code == 0
    assert "2: b, c" in out
    assert cli("merge", "-c", recipe)[0] == 0
    same(tmp_path / "later", expected)


def test_weights_of_the_removed_go_with_them(cli, tmp_path, three):
    weights = {"a": 0.5, "b": 2.0, "c": 1.5}
    merged = kept(cli, tmp_path, three, method="linear", params={"weights": weights})
    assert cli("merge", "--from", merged, "--remove", "b", "-o", tmp_path / "later")[0] == 0
    report = read_json(tmp_path / "later" / "merge_report.json")
    assert report["params"]["weights"] == {"a": 0.5, "c": 1.5}
    code, _, err = cli("merge", "--from", merged, "--method", "ties", "-o", tmp_path / "ties")
    assert (code, besides_cuts(err)) == (0, [])  # whose parameters are others
    assert read_json(tmp_path / "ties" / "merge_report.json")["method"] == "ties"


def test_weights_in_a_list_do_not_move_to_others(cli, tmp_path, three):
    merged = kept(cli, tmp_path, three, method="linear", params={"weights": [0.5, 2.0, 1.5]})
    save_lora(tmp_path / "d", 9)
    order = ("merge", "--from", merged, "--remove", "a", tmp_path / "d", "-o", tmp_path / "later")
    code, _, err = cli(*order)
    assert code == 2
    assert "weights" in err
    assert cli(*order, "params.weights.d=0.7")[0] == 0  # beside those that were kept
    report = read_json(tmp_path / "later" / "merge_report.json")
    assert report["params"]["weights"] == {"b": 2.0, "c": 1.5, "d": 0.7}


def test_heads_are_kept_with_their_adapters(cli, tmp_path):
    head = {"classifier.weight": torch.ones(2, 16)}
    folders = {n: save_lora(tmp_path / n, i, saved=head) for i, n in enumerate("ab")}
    merged = kept(cli, tmp_path, folders, modules_to_save="keep")
    assert cli("merge", "--from", merged, "--remove", "b", "-o", tmp_path / "later")[0] == 0
    (saved,) = (tmp_path / "later" / "saved_modules").iterdir()
    assert saved.stem == "a"


def test_a_single_file_of_any_ending_is_kept(cli, tmp_path):
    name, draw = "lora_unet_mid_block_attentions_0_proj_in", torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, 5, generator=draw),
        f"{name}.lora_up.weight": torch.randn(6, 2, generator=draw),
    }
    save_file(tensors, tmp_path / "style.sft")
    expected = at_once(cli, tmp_path, {"style": tmp_path / "style.sft"})
    merged = kept(cli, tmp_path, {"style": tmp_path / "style.sft"}, silent=False)
    code, *_ = cli("merge", "--from", merged, "-o", tmp_path / "later")
    assert code == 0
    same(tmp_path / "later", expected)


def test_every_format_is_kept_as_it_was(cli, tmp_path, three):
    mlx = tmp_path / "mlx"
    assert cli("export", three["a"], "--format", "mlx", "-o", mlx)[0] == 0
    sharded = tmp_path / "sharded"
    _shard(three["b"], sharded)
    folders = {"a": mlx, "b": sharded}
    prints = {file.name: file.fingerprint for file in open_all(list(folders.items()))}
    recipe = recipe_of(tmp_path / "r.yaml", folders, keep_factors=True, same_base=True)
    assert cli("merge", "-c", recipe)[0] == 0
    merged = tmp_path / "merged"
    again = {name: merged / "factors" / "adapters" / name for name in folders}
    assert {f.name: f.fingerprint for f in open_all(list(again.items()), same_base=True)} == prints


def _shard(source, folder):
    tensors = load_file(source / WEIGHTS)
    folder.mkdir()
    shutil.copy(source / "adapter_config.json", folder)
    places = {}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        file = f"adapter_model-{i % 2 + 1:05d}-of-00002.safetensors"
        places.setdefault(file, {})[name] = tensor
    for file, part in places.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in places.items() for name in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, **index}))


def test_what_is_wrong_is_said(cli, tmp_path, three):
    plain = at_once(cli, tmp_path, three)
    code, _, err = cli("merge", "--from", plain, "-o", tmp_path / "later")
    assert code == 2
    assert "has kept no adapters" in err
    merged = kept(cli, tmp_path, three)
    code, _, err = cli("merge", "--from", merged, "--remove", "d", "-o", tmp_path / "later")
    assert code == 2
    assert "remove: 'd' but one of a, b, c is expected" in err
    code, _, err = cli("merge", "--from", merged, "-o", merged)
    assert code == 3
    assert "inputs stay as they are" in err
    assert cli("merge", "--remove", "a", "-o", tmp_path / "later")[0] == 2
    save_lora(tmp_path / "a", 5)
    for words, told in (
        (("--from", tmp_path / "no", "-o", tmp_path / "later"), "no such folder"),
        (("--from", merged, "-o", merged / "next"), "lies in"),
        (("--from", merged, tmp_path / "a", "-o", tmp_path / "later"), "has one of that name"),
    ):
        code, _, err = cli("merge", *words)
        assert code == 2
        assert told in err
    recipe = recipe_of(tmp_path / "r.yaml", {"a": tmp_path / "a"}, remove=["a"])
    code, _, err = cli("merge", "-c", recipe)
    assert code == 2
    assert "remove: without earlier" in err
    removed = [word for name in three for word in ("--remove", name)]
    code, _, err = cli("merge", "--from", merged, *removed, "-o", tmp_path / "later")
    assert code == 2
    assert "adapters: " in err
    assert not (tmp_path / "later").exists()


def test_an_order_of_a_stranger_opens_no_door(cli, tmp_path, three):
    from icm_ray.config import MergeRecipe

    merged = kept(cli, tmp_path, three)
    file = merged / "factors" / "order.json"
    order = {**read_json(file), "allow_code": True, "allow_pickle": True, "storage": "/elsewhere"}
    file.write_text(json.dumps({**order, "output": {"path": "/elsewhere", "rank": 2}}))
    recipe = MergeRecipe.model_validate({"earlier": str(merged), "output": str(tmp_path / "later")})
    assert (recipe.allow_code, recipe.allow_pickle, recipe.storage) == (False, False, None)
    assert (recipe.output.path, recipe.output.rank) == (str(tmp_path / "later"), 2)


def test_a_damaged_order_is_said(cli, tmp_path, three):
    merged = kept(cli, tmp_path, three)
    (merged / "factors" / "order.json").write_text("{}")
    code, _, err = cli("merge", "--from", merged, "-o", tmp_path / "later")
    assert code == 3
    assert "no order of a merge" in err


def test_kept_factors_are_the_merges_own_and_no_part_of_its_upload(cli, tmp_path, three):
    merged = kept(cli, tmp_path, three)
    assert not [name for name in read_json(merged / "manifest.json")["files"] if "factors" in name]
    file = merged / "factors" / "adapters" / "a" / WEIGHTS
    verify_folder(merged)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{WEIGHTS}: sha256 differs"):
        verify_folder(merged)
    save_lora(tmp_path / "d", 7)
    code, *_ = cli("merge", tmp_path / "d", "--method", "soup", "-o", merged)
    assert code == 0  # ours, so replaced
    assert not (merged / "factors").exists()


def grams_of(names, seed=0):
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        for module, (_, d_in) in SHAPES.items():
            rows = torch.randn(32, d_in, generator=draw)
            tensors[f"{module}.gram.{name}"] = rows.T @ rows
    return tensors


def test_gram_statistics_stay_with_the_adapters_and_are_joined(cli, tmp_path, three):
    prints = {f.name: f.fingerprint for f in open_all(list(three.items()))}
    tensors = grams_of("abc")

    def write(name, tasks):
        part = {n: t for n, t in tensors.items() if n.rpartition(".")[2] in tasks}
        about = {"inputs": dict.fromkeys(tasks, 32), "rows": {t: {} for t in tasks}}
        adapters = {t: prints[t] for t in tasks}
        write_evidence(tmp_path / name, "gram_statistics", part, adapters=adapters, described=about)
        return str(tmp_path / name)

    whole, first, _ = write("grams", "abc"), write("first", "ab"), write("new", "c")
    expected = at_once(cli, tmp_path, three, method="regmean", evidence=whole)
    two = {name: three[name] for name in "ab"}
    alone = recipe_of(
        tmp_path / "a.yaml",
        {"a": three["a"]},
        method="regmean",
        evidence=first,
        output=str(tmp_path / "a_alone"),
    )
    assert cli("merge", "-c", alone)[0] == 0
    merged = kept(cli, tmp_path, two, method="regmean", evidence=first)
    shutil.rmtree(first)
    assert cli("merge", "--from", merged, "--remove", "b", "-o", tmp_path / "later")[0] == 0
    assert sha256_of_file(tmp_path / "later" / WEIGHTS) == sha256_of_file(
        tmp_path / "a_alone" / WEIGHTS
    )
    # A new one needs statistics too.
    code, _, err = cli("merge", "--from", merged, three["c"], "-o", tmp_path / "later")
    assert code == 3
    assert "2 of 3 tensors" in err
    less = ("merge", "--from", merged, "--remove", "b", "-o", tmp_path / "less")
    assert cli(*less, "keep_factors=true")[0] == 0
    assert set(read_evidence(tmp_path / "less" / "factors" / "evidence").adapters) == {"a"}
    join_grams([merged / "factors" / "evidence", tmp_path / "new"], tmp_path / "joined", "abc")
    assert read_evidence(tmp_path / "joined").names == read_evidence(tmp_path / "grams").names
    code, _, err = cli(
        *("merge", "--from", merged, three["c"], "-o", tmp_path / "later"),
        f"evidence={tmp_path / 'joined'}",
    )
    assert (code, besides_cuts(err)) == (0, [])
    assert sha256_of_file(tmp_path / "later" / WEIGHTS) == sha256_of_file(expected / WEIGHTS)
