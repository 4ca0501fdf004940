"""The numbers a plan promises are those of the file the merge then writes."""

import time
from pathlib import Path

import pytest
import torch
from command_samples import SHAPES, recipe_of, save_lora
from safetensors.torch import load_file

from icm_ray.adapters import open_all, values
from icm_ray.adapters.fingerprint import add_to_digest
from icm_ray.config import MergeRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import InputError, RecipeError
from icm_ray.merging import estimate
from icm_ray.merging.estimate import inspect_adapters
from icm_ray.merging.folder import Origin, write_merged
from icm_ray.merging.merge import merge, merge_as_asked
from icm_ray.merging.order import MergeRequest

ROOT = Path(__file__).parents[2]
LARGE = {
    f"layers.{i}.{leaf}": size
    for i in range(3)
    for leaf, size in (("q", (128, 128)), ("v", (32, 128)), ("o", (128, 32)))
}


@pytest.fixture
def plan(tmp_path):
    """Return a function that plans a merge of folders by name."""

    def planned(folders, **keys):
        path = recipe_of(tmp_path / "plan.yaml", folders, **keys)
        return estimate.plan(load_recipe(MergeRecipe, path))

    return planned


def merged_file(folders, tmp_path, **order):
    files = open_all(list(folders.items()))
    rank = order.pop("output_rank", None)
    result = merge([f.load() for f in files], **order, output_rank=rank)
    write_merged(result, tmp_path / "merged", Origin(files, ""))
    return result, (tmp_path / "merged" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("method", "rank", "ranks", "expected"),
    [
        ("soup", None, (4, 8, 3), 15),
        ("cat", None, (4, 8, 3), 15),
        ("svd", None, (4, 8, 3), 8),
        ("svd", 6, (4, 8, 3), 6),
        ("soup", 6, (4, 8, 3), 6),
        ("soup", "exact", (4, 8, 3), 15),
        ("soup", "serving:64", (4, 8, 3), 15),
        ("soup", None, (40, 40, 60), 128),  # no more than the largest module has
        ("linear", None, (4, 4, 4), 12),
    ],
)
def test_rank_and_size_are_those_of_the_file(plan, tmp_path, method, rank, ranks, expected):
    folders = {
        f"t{i}": save_lora(tmp_path / f"t{i}", i, rank=r, shapes=LARGE) for i, r in enumerate(ranks)
    }
    output = {"path": "merged", **({"rank": rank} if rank else {})}
    found = plan(folders, method=method, output=output)
    assert found["modules"] == len(LARGE)
    assert found["exact_rank"] == min(sum(ranks), 128)
    result, size = merged_file(folders, tmp_path, method=method, output_rank=rank)
    if method == "linear":  # sums of factors: the plan only bounds it
        assert result.adapter.max_rank <= found["output_rank"]
        return
    assert found["output_rank"] == expected == result.adapter.max_rank
    assert found["output_bytes"] == pytest.approx(size, rel=0.1)


def test_half_precision_halves_the_size(plan, tmp_path):
    folders = {n: save_lora(tmp_path / n, i, shapes=LARGE) for i, n in enumerate("ab")}
    full = plan(folders)["output_bytes"]
    assert plan(folders, output={"path": "x", "dtype": "float16"})["output_bytes"] == full / 2


def test_the_summary_says_what_a_server_and_a_cluster_need(plan, tmp_path):
    folders = {n: save_lora(tmp_path / n, i, rank=9) for i, n in enumerate("ab")}
    found = plan(folders, resources={"workers": 3, "gpus_per_worker": 0.5})
    said = found["summary"]
    assert said["adapters"] == "2: a, b"
    assert said["server needs"] == "--max-lora-rank 16"
    assert said["cluster"] == "workers: 3; CPUs 1 and GPUs 0.5 each"
    assert said["data needed"] == "none"
    assert found["seconds"] > 0
    assert found["worker_bytes"] > 100_000_000


def test_each_pass_over_all_modules_costs_another_look_at_them(plan, tmp_path):
    folders = {n: save_lora(tmp_path / n, i) for i, n in enumerate("ab")}
    once = plan(folders, method="svd")["seconds"]
    assert plan(folders, method="svd_latent")["seconds"] == pytest.approx(2 * once)
    trimmed = plan(folders, method="knots_ties", params={"density": 0.2})["seconds"]
    assert trimmed > plan(folders, method="knots_ties", params={"density": 1.0})["seconds"]


def test_who_writes_holds_the_result_the_inputs_and_the_base(plan, tmp_path, tiny_bert):
    folders = {n: save_lora(tmp_path / n, i, shapes=LARGE) for i, n in enumerate("ab")}
    found = plan(folders)
    least = 2 * found["output_bytes"] + sum(
        (folder / "adapter_model.safetensors").stat().st_size for folder in folders.values()
    )
    assert found["writer_bytes"] - found["worker_bytes"] >= least
    weights = 4 * sum(x.numel() for x in load_file(tiny_bert / "model.safetensors").values())
    more = plan(folders, base=str(tiny_bert))["writer_bytes"] - found["writer_bytes"]
    assert more > weights + 2 * found["output_bytes"], "PEFT and its copy, too"


def test_modules_that_not_all_have_are_counted_and_warned_of(plan, tmp_path):
    some = dict(list(SHAPES.items())[::2])
    folders = {
        "all": save_lora(tmp_path / "all", 1),
        "some": save_lora(tmp_path / "some", 2, shapes=some),
    }
    found = plan(folders)
    assert found["summary"]["modules not in every adapter"] == len(SHAPES) - len(some)
    assert any("some: lacks" in line for line in found["warnings"])


def test_a_sum_of_many_deltas_is_warned_of(plan, tmp_path):
    folders = {f"t{i}": save_lora(tmp_path / f"t{i}", i) for i in range(3)}
    warned = plan(folders, method="task_arithmetic")["warnings"]
    assert any("0.3 to 0.5 is usual" in line for line in warned)
    assert plan(folders, method="task_arithmetic", params={"scale": 0.3})["warnings"] == []


def test_every_problem_of_every_adapter_is_told(plan, tmp_path):
    folders = {f"t{i}": save_lora(tmp_path / f"t{i}", i) for i in range(4)}
    (folders["t0"] / "adapter_config.json").unlink()
    (folders["t1"] / "adapter_model.safetensors").write_bytes(b"junk")
    save_lora(folders["t2"], 2, use_dora=True)
    with pytest.raises(InputError) as caught:
        plan(folders)
    told = "\n".join(caught.value.problems)
    assert all(str(folders[name]) in told for name in ("t0", "t1", "t2"))
    assert str(folders["t3"]) not in told


def test_adapters_that_do_not_fit_each_other(plan, tmp_path):
    wide = dict.fromkeys(SHAPES, (16, 24))
    folders = {
        "a": save_lora(tmp_path / "a", 1),
        "b": save_lora(tmp_path / "b", 2, shapes=wide),
        "c": save_lora(tmp_path / "c", 3, base_model_name_or_path="another/model"),
    }
    with pytest.raises(InputError) as caught:
        plan(folders)
    told = "\n".join(caught.value.problems)
    assert "b: encoder.layer.0.attention.self.query: 16 x 24 but 16 x 16" in told
    assert "'another/model' (c)" in told


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "soop"}, "Did you mean 'soup'?"),
        ({"params": {"scale": 1.0}}, "no such parameter"),
        ({"evidence": "somewhere"}, "uses none"),
        ({"output": {"path": "x", "rank": "most"}}, "most"),
    ],
)
def test_a_wrong_order_is_refused(plan, tmp_path, keys, words):
    with pytest.raises(RecipeError) as caught:
        plan({"a": save_lora(tmp_path / "a")}, **keys)
    assert words in str(caught.value)


def test_inspect_reports_facts_and_cosines(tmp_path):
    folders = [
        save_lora(tmp_path / "one", 1, rank=4, dtype=torch.float16),
        save_lora(tmp_path / "twin", 1, rank=4, dtype=torch.float16, size=0.5),
        save_lora(tmp_path / "against", 1, rank=4, size=-1.0),
        save_lora(tmp_path / "other", 2, use_rslora=True),
    ]
    found = inspect_adapters(folders)
    one, twin, against, other = found["adapters"]
    assert [row["name"] for row in found["adapters"]] == ["one", "twin", "against", "other"]
    assert (one["ranks"], one["scalings"], one["dtype"]) == ([4], [2.0], "float16")
    assert (against["dtype"], other["ranks"]) == ("float32", [2])
    assert other["scalings"] == [pytest.approx(4 / 2**0.5)]
    assert one["norm"] == pytest.approx(2 * twin["norm"], rel=1e-3)
    size = (folders[0] / "adapter_model.safetensors").stat().st_size
    assert (one["bytes"], one["modules"]) == (size, len(SHAPES))
    cosines = found["cosines"]
    assert cosines["one"]["one"] == pytest.approx(1)
    assert cosines["one"]["twin"] == pytest.approx(1, abs=1e-3)
    assert cosines["one"]["against"] == pytest.approx(-1, abs=1e-3)
    assert abs(cosines["one"]["other"]) < 0.5
    assert cosines["other"]["one"] == cosines["one"]["other"]


def test_inspect_of_one_adapter_compares_nothing(tmp_path):
    found = inspect_adapters([save_lora(tmp_path / "one", saved={"head.weight": torch.ones(2)})])
    assert found["cosines"] == {}
    assert any("modules_to_save" in line for line in found["warnings"])


def test_a_plan_hashes_what_may_be_equal_alone(plan, tmp_path, monkeypatch):
    hashed = []

    def counting(digest, module, factors):
        hashed.append(module)
        add_to_digest(digest, module, factors)

    monkeypatch.setattr(values, "add_to_digest", counting)
    folders = {f"t{i}": save_lora(tmp_path / f"t{i}", i) for i in range(3)}
    assert plan(folders)["warnings"] == []
    assert hashed == []
    folders["again"] = save_lora(tmp_path / "again", 1)
    assert plan(folders)["warnings"] == ["again: the same change as t1, twice."]
    assert len(hashed) == 2 * len(SHAPES)


def test_a_fit_in_rounds_is_planned_as_long_as_it_takes():
    folders = sorted((ROOT / "docs/results/vision/experts/shared-seed0").glob("*/adapter"))
    files = open_all([(folder.parent.name, folder) for folder in folders])
    request = MergeRequest("compress_then_merge")
    planned = estimate.merge_seconds(files, request)
    started = time.process_time()
    merge_as_asked(files, request)
    spent = time.process_time() - started
    assert planned / 5 <= spent <= 5 * planned
