"""The whole pipeline on the tiny base: two tasks, two methods, and nothing done twice."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from ray_samples import ROOT, hashes, stamps, write_yaml
from typer.testing import CliRunner

import icm_ray
from icm_ray.adapters import load_adapter, open_all
from icm_ray.cli import app
from icm_ray.command import run_job
from icm_ray.config import PipelineRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import RecipeError
from icm_ray.evidence.learned import load_learned
from icm_ray.files import RUN_FILE, read_json, read_manifest
from icm_ray.fusion.latent import DIRECT
from icm_ray.workflows.learn import learned_row
from icm_ray.workflows.pipeline.stages import check_rows
from jobs.pipeline import work

SET = "shared-seed0"
KEPT = ("experts", "trajectories", "probes", "merged", "evidence", "scores", "adapter")
RECIPE = {
    "name": "tiny",
    "tasks": ["keyword", "supersense"],
    "lora": {"rank": 4, "alpha": 8, "targets": ["query", "value"]},
    "training": {"steps": 6, "batch": 16, "train_examples": 200, "checkpoints": 2},
    "sizes": {"calibration": 16, "validation": 60, "test": 40},
    "resources": {"workers": 2, "cpus_per_worker": 1},
    "methods": [
        {"method": "svd"},
        {"method": "task_arithmetic", "params": {"scale": 9.0}, "grid": {"scale": [0.3, 0.6]}},
    ],
}
LEARNED = {
    "label": "learned",
    "method": "row_space_match",
    "inputs": 8,
    "learn": {
        "parameters": {"kind": "coefficients"},
        "start": {"value": "1/K", "residual": None},
        "optimisation": {"steps": 2, "batch": 4},
    },
}


FUSION = {"vae": {"hidden": 8, "latent": 2}, "vae_steps": 4, "meta_steps": 1, "batch": 2}
SHORT = {"optimisation": {"steps": 2, "batch": 4}}
FUSED = [
    {"label": "fused", "method": "icm_fusion", "fusion": FUSION, "grid": {"rule": ["soup"]}},
    {"label": "summed", "method": "icm_fusion", "fusion": FUSION, "params": {"rule": "arithmetic"}},
    {
        "label": "adapted",
        "method": "icm_fusion",
        "fusion": FUSION,
        "in_context": "direct",
        "inputs": 8,
        "learn": SHORT,
    },
    {
        "label": "above-regmean",
        "method": "icm_fusion",
        "fusion": FUSION,
        "in_context": "latent",
        "inputs": 8,
        "learn": {
            **SHORT,
            "start": {"residual": "regmean"},
            "objective": {"kind": "distillation"},
        },
    },
    {
        "label": "one",
        "method": "icm_fusion",
        "fusion": {**FUSION, "meta_steps": 0},
        "tasks": ["keyword"],
    },
]


@pytest.fixture(scope="module")
def plain(tiny_bert):
    return {**RECIPE, "base": str(tiny_bert)}


@pytest.fixture(scope="module")
def recipe(plain, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    return write_yaml(root / "tiny.yaml", {**plain, "output": str(root / "out")})


@pytest.fixture(scope="module")
def out(recipe, ray_session):
    assert run_job(PipelineRecipe, work, "", ["-c", str(recipe)]) == 0
    return recipe.with_name("out")


@pytest.mark.slow
def test_the_report_has_every_row(out):
    (data,) = (out / "report").glob("*.parquet")
    rows = pq.read_table(data).to_pylist()
    for task in RECIPE["tasks"]:
        shown = {
            (r["method"], r["tuned"]) for r in rows if (r["task"], r["split"]) == (task, "test")
        }
        assert shown == {
            ("expert", False),
            ("base", False),
            ("probe", False),
            ("svd", False),
            ("task_arithmetic", False),
            ("task_arithmetic", True),
        }
    assert all(r["low"] <= r["score"] <= r["high"] for r in rows)
    page = (out / "report" / "index.html").read_text()
    assert "task_arithmetic" in page
    assert str(out) not in page


@pytest.mark.slow
def test_results_say_what_was_made(out):
    found = read_json(out / "results.json")
    assert (found["status"], found["exit_code"], found["problems"]) == ("done", 0, [])
    assert found["outputs"] == {
        "adapter": str(out / "adapter"),
        "report": str(out / "report" / "index.html"),
    }
    rows = {f"{SET}/{row}" for row in ("svd", "task_arithmetic", "task_arithmetic (tuned)")}
    assert rows | {f"{SET}/expert", f"{SET}/base"} <= set(found["scores"])
    assert found["scores"][f"{SET}/expert"] == {"mean": 1.0, "worst": 1.0}


@pytest.mark.slow
def test_the_test_split_scored_the_default_and_what_was_chosen_alone(out):
    # The default is so large that any point of the grid is better; the others leave no folder.
    merged = {
        path.parent.name for path in (out / "merged" / SET).glob("task_arithmetic/*/README.md")
    }
    assert "default" in merged
    assert merged - {"default"} in ({"scale=0.3"}, {"scale=0.6"})
    references = 1 + len(RECIPE["tasks"])  # the base, and each task's expert
    scored = {
        split: len(list((out / "scores" / f"{SET}-{split}").iterdir()))
        for split in ("validation", "test")
    }
    assert scored == {"validation": references + 3, "test": references + 3}  # svd is not tuned
    for folder in (out / "scores").glob("*/*"):
        read_manifest(folder)


@pytest.mark.slow
def test_running_it_again_touches_nothing(out, recipe):
    before = {name: stamps(out / name) for name in KEPT}
    assert all(before.values())
    assert run_job(PipelineRecipe, work, "", ["-c", str(recipe)]) == 0
    assert {name: stamps(out / name) for name in KEPT} == before


@pytest.mark.slow
def test_a_new_row_adds_its_own_work_only(out, plain, recipe):
    kept = {name: stamps(out / name) for name in ("experts", "evidence", "probes")}
    merged = stamps(out / "merged" / SET / "svd")
    path = write_yaml(
        recipe.with_name("more.yaml"),
        {
            **plain,
            "output": str(out),
            "methods": [
                *RECIPE["methods"],
                {"method": "soup"},
                LEARNED,
                {"label": "half", "method": "soup", "tasks": ["keyword"]},
            ],
        },
    )
    assert run_job(PipelineRecipe, work, "", ["-c", str(path)]) == 0
    assert {name: stamps(out / name) for name in kept} == kept
    assert stamps(out / "merged" / SET / "svd") == merged
    assert {f"{SET}/soup", f"{SET}/learned"} <= set(read_json(out / "results.json")["scores"])


@pytest.mark.slow
def test_a_learned_row_costs_what_it_took_and_sees_the_inputs_it_asks_for(out):
    (data,) = (out / "report").glob("*.parquet")
    spent = {row["method"]: row["seconds"] for row in pq.read_table(data).to_pylist()}
    learned = out / "learned" / SET / "learned"
    assert spent["learned"] > read_json(learned / RUN_FILE)["cpu_seconds"] > 0
    assert read_json(learned / "evidence.json")["origin"]["optimisation"]["steps"] == 2
    assert read_manifest(learned)["inputs"] == dict.fromkeys(RECIPE["tasks"], 8)


@pytest.mark.slow
def test_a_row_of_some_experts_is_scored_on_every_task(out):
    # One expert alone is its own average; the other task is unseen, and scored all the same.
    rows = pq.read_table(out / "report" / "results.parquet").to_pylist()
    half = {r["task"]: r for r in rows if r["method"] == "half"}
    assert {task: row["seen"] for task, row in half.items()} == {
        "keyword": True,
        "supersense": False,
    }
    assert half["keyword"]["normalised"] == pytest.approx(1)
    assert "Seen and unseen tasks" in (out / "report" / "index.html").read_text()


def test_a_fusion_row_s_mistakes_are_named():
    rows = [
        {"method": "soup", "in_context": "latent"},
        {"method": "icm_fusion", "fusion": {"vae": {"width": 3}}},
        {
            "label": "asked",
            "method": "icm_fusion",
            "in_context": "latent",
            "learn": {"objective": {"kind": "entropy"}},
        },
        {
            "label": "factors",
            "method": "icm_fusion",
            "fusion": {"representation": {"gauge": "raw"}},
            "in_context": "latent",
            "learn": {"start": {"residual": "regmean"}},
        },
        {
            "label": "stages",
            "method": "icm_fusion",
            "in_context": "direct",
            "learn": {"direct": {"stepps": 3}},
        },
        {
            "label": "shallow",
            "method": "icm_fusion",
            "in_context": "latent",
            "learn": {"direct": {"steps": 3}},
        },
        {
            "label": "sizes",
            "method": "icm_fusion",
            "in_context": "direct",
            "learn": {"direct": {"batch": 3}},
        },
        {"label": "guarded", "method": "icm_fusion", "grid": {"rule": ["soop"]}},
    ]
    recipe = PipelineRecipe.model_validate({**RECIPE, "output": "x", "methods": rows})
    words = r"(?s)soup: .*icm_fusion: fusion\.vae\.width.*asked: .*'entropy' but in_context knows"
    words += r".*factors: .*in gauge raw.*stages: learn\.direct\.stepps.*shallow: .*is not set"
    words += r".*sizes: .*batch: the same in both stages"
    words += r".*guarded: .*'soop'"
    with pytest.raises(RecipeError, match=words):
        check_rows(recipe)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is compared as text")  # where the tiny base lies
def test_the_adapter_is_proven(out, tiny_bert):
    cli = CliRunner()
    done = cli.invoke(app, ["verify", str(out / "adapter"), "--base", str(tiny_bert)])
    assert done.exit_code == 0, done.output
    done = cli.invoke(app, ["reproduce", str(out / "adapter")])
    assert done.exit_code == 0, done.output
    card = (out / "adapter" / "README.md").read_text()
    assert str(tiny_bert.parent) not in card, "a path of this machine"
    assert "Scores on the test split" in card
    # Every clock is outside the comparison of bytes.
    assert {row["seconds"] for row in read_json(out / "adapter" / "scores.json")} == {0.0}
    report = read_json(out / "adapter" / "merge_report.json")
    merged = out / "merged" / SET / report["method"]
    prints = {load_adapter(path.parent).fingerprint for path in merged.glob("*/README.md")}
    assert report["fingerprint"] in prints


@pytest.mark.slow
def test_every_stage_left_whole_folders_and_nothing_else(out):
    assert not list(out.rglob(".*"))
    made = ("learned", "ratios", "report", "results.json")
    assert {path.name for path in out.iterdir()} == {*KEPT, *made}
    for name in (
        "adapter",
        f"evidence/{SET}",
        f"experts/{SET}/keyword",
        "probes/keyword",
        "report",
    ):
        read_manifest(out / name)
    assert hashes(out / "adapter")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pipeline").glob("*.yaml")), ids=str)
def test_shipped_tables_are_sound(path):
    check_rows(load_recipe(PipelineRecipe, path))


def test_a_form_of_grams_that_no_row_reads_is_refused():
    rows = [{"method": "soup"}, {"method": "nsc"}]
    plain = {**RECIPE, "output": "unused", "resources": {"grams": "diagonal"}}
    with pytest.raises(RecipeError, match=r"resources.grams: diagonal but no row reads any"):
        check_rows(PipelineRecipe.model_validate({**plain, "methods": rows}))
    rows.append({"method": "regmean"})
    check_rows(PipelineRecipe.model_validate({**plain, "methods": rows}))


def test_a_row_names_experts_that_exist():
    rows = [{"method": "soup", "tasks": ["keyword", "keywrd"]}]
    recipe = PipelineRecipe.model_validate({**RECIPE, "output": "unused", "methods": rows})
    with pytest.raises(RecipeError, match=r"methods.soup.tasks: 'keywrd' has no expert.*keyword"):
        check_rows(recipe)


@pytest.mark.slow
def test_fusion_rows_share_what_has_one_recipe(out, plain, recipe):
    before = stamps(out / "experts")
    validated = len(list((out / "scores" / f"{SET}-validation").iterdir()))
    rows = json.loads(json.dumps([*RECIPE["methods"], *FUSED]))  # YAML would write aliases
    changed = write_yaml(
        recipe.with_name("fused.yaml"), {**plain, "output": str(out), "methods": rows}
    )
    assert run_job(PipelineRecipe, work, "", ["-c", str(changed)]) == 0
    assert stamps(out / "experts") == before
    models = list((out / "fusion" / SET).iterdir())
    assert len(models) == 2
    assert all(read_json(folder / RUN_FILE)["cpu_seconds"] > 0 for folder in models)
    merged = {
        row: load_adapter(out / "merged" / SET / row / "default")
        for row in (row["label"] for row in FUSED)
    }
    deltas = {row: {m: f.delta() for m, f in one.modules.items()} for row, one in merged.items()}
    expert = load_adapter(out / "experts" / SET / "keyword" / "adapter")
    for module, delta in deltas["one"].items():  # residual: a single adapter comes back
        torch.testing.assert_close(delta, expert.modules[module].delta(), rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(deltas["fused"][m], d) for m, d in deltas["adapted"].items())
    assert any(not torch.equal(deltas["fused"][m], d) for m, d in deltas["summed"].items())
    beneath = icm_ray.merge(
        [load_adapter(out / "experts" / SET / task / "adapter", task) for task in RECIPE["tasks"]],
        "regmean",
        evidence=out / "evidence" / f"{SET}-grams",
    ).adapter
    kept_beneath = load_learned(out / "learned" / SET / "above-regmean").tensors
    for module, factors in beneath.modules.items():
        residual = kept_beneath[f"{module}.residual_b"] @ kept_beneath[f"{module}.residual_a"]
        torch.testing.assert_close(residual, factors.delta(), rtol=1e-3, atol=1e-5)
        away = (deltas["above-regmean"][module] - factors.delta()).norm()
        assert away > 1e-3 * factors.delta().norm()
    kept = stamps(out / "fusion"), stamps(out / "learned")
    assert run_job(PipelineRecipe, work, "", ["-c", str(changed)]) == 0
    assert (stamps(out / "fusion"), stamps(out / "learned")) == kept

    # Validation data choose between the rule and the average.
    table = pq.read_table(out / "report" / "results.parquet").to_pylist()
    tuned = {row["params"] for row in table if row["method"] == "fused" and row["tuned"]}
    assert tuned <= {"default", "rule=soup"}
    assert len(tuned) == 1
    scored = len(list((out / "scores" / f"{SET}-validation").iterdir()))
    assert scored == validated + 2, "the rule and the average"

    # The page shows what was adapted in context as what was learned, both stages in a row.
    page = (out / "report" / "index.html").read_text()
    shown = {row["label"]: f"What {row['label']} learned" in page for row in FUSED}
    assert shown == {row["label"]: "in_context" in row for row in FUSED}
    folder = out / "learned" / SET / "adapted"
    experts = [(task, out / "experts" / SET / task / "adapter") for task in RECIPE["tasks"]]
    history = learned_row("adapted", folder, open_all(experts)).history
    latent = read_json(folder / "evidence.json")["report"]["latent"]["history"]
    assert all(history[task][:2] == latent[task] for task in RECIPE["tasks"])
    assert {len(losses) for losses in history.values()} == {2 + DIRECT.optimisation.steps}
