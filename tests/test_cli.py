"""The command line: what it shows, what it refuses in one line, and with which exit code."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from command_samples import SHAPES, recipe_of, save_lora
from safetensors.torch import load_file, save_file

from icm_ray.command import quiet_libraries
from icm_ray.config import MergeRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import RecipeError
from icm_ray.merging.recipe import refuse_unused
from icm_ray.methods import METHODS


@pytest.fixture
def two(tmp_path):
    return {"a": save_lora(tmp_path / "a", 1), "b": save_lora(tmp_path / "b", 2, rank=3)}


@pytest.fixture
def recipe(tmp_path, two):
    return recipe_of(tmp_path / "recipe.yaml", two)


def errors(stderr):
    lines = stderr.splitlines()
    assert lines
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), stderr
    assert "Traceback" not in stderr
    return [line for line in lines if line.startswith("error: ")]


def test_methods_lists_every_method(cli):
    code, out, _ = cli("methods")
    assert code == 0
    assert all(name in out for name in METHODS)
    assert "[w_1" in out, "brackets are no markup"


def test_the_schema_says_all_a_caller_needs(cli):
    code, out, _ = cli("methods", "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found) == list(METHODS)
    for name, row in found.items():
        assert row.keys() >= {"summary", "formula", "use", "paper", "cost", "scope"}, name
        assert row.keys() >= {"evidence", "default_rank", "parameters", "presets", "exempt"}, name
        assert row["default_rank"] in ("exact", "largest input")
        assert row["scope"] in ("module", "adapter")
        assert all(row[key] for key in ("summary", "formula", "use", "paper", "cost")), name
        for parameter, described in row["parameters"].items():
            where = f"{name}.{parameter}"
            assert described.get("description"), where
            assert "default" in described, where
            assert described.keys() & {"type", "anyOf", "enum", "const", "$ref"}, where


def test_the_schemas_presets_have_values(cli):
    presets = json.loads(cli("methods", "--json")[1])["linear"]["presets"]
    assert set(presets) == {"peft", "nsc"}
    assert all(presets.values())


def test_inspect_shows_a_table_and_the_cosines(cli, two):
    code, out, _ = cli("inspect", *two.values())
    assert code == 0
    assert "cosine of deltas, a: a +1.000" in out
    assert "tiny" in out


def test_inspect_as_json(cli, two):
    code, out, _ = cli("inspect", "--json", *two.values())
    found = json.loads(out)
    assert code == 0
    assert [row["name"] for row in found["adapters"]] == ["a", "b"]
    assert found["adapters"][1]["ranks"] == [3]
    assert set(found["cosines"]["a"]) == {"a", "b"}


def test_inspect_warns_of_what_is_odd(cli, two, tmp_path):
    some = dict(list(SHAPES.items())[:2])
    lacking = save_lora(tmp_path / "lacking", 3, shapes=some)
    code, _, err = cli("inspect", two["a"], lacking)
    assert code == 0
    assert "warning: lacking: lacks 2 of 4 modules" in err


def test_inspect_shows_adapters_that_do_not_fit_together_and_why(cli, two, tmp_path):
    other = save_lora(tmp_path / "other", 3, base_model_name_or_path="org/another")
    code, out, err = cli("inspect", two["a"], other)
    assert code == 3
    assert "another" in out
    assert "same_base: true" in errors(err)[0]
    code, out, _ = cli("inspect", "--json", two["a"], other)
    assert code == 3
    assert len(json.loads(out)["adapters"]) == 2


def test_inspect_of_what_is_no_adapter(cli, tmp_path):
    code, _, err = cli("inspect", tmp_path / "nowhere")
    assert code == 3
    assert "no such folder" in errors(err)[0]


def test_a_name_with_an_escape_sequence_does_not_reach_the_terminal(cli, tmp_path):
    folder = save_lora(tmp_path / "one", base_model_name_or_path="evil\x1b[31mname")
    _, out, _ = cli("inspect", folder)
    assert "\x1b[31m" not in out
    assert "\\x1b[31m" in out


def test_plan_shows_rank_and_size(cli, recipe):
    code, out, _ = cli("plan", "-c", recipe)
    assert code == 0
    assert "5 (exact would be 5)" in out
    assert "MB in float32" in out


def test_plan_names_three_bad_adapters_at_once(cli, tmp_path, two):
    bad = {name: save_lora(tmp_path / name, 5) for name in ("x", "y", "z")}
    (bad["x"] / "adapter_config.json").write_text("{")
    (bad["y"] / "adapter_model.safetensors").unlink()
    weights = bad["z"] / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    code, out, err = cli("plan", "-c", recipe_of(tmp_path / "r.yaml", {**two, **bad}))
    assert code == 3
    assert out == ""
    told = "\n".join(errors(err))
    assert all(str(folder) in told for folder in bad.values())
    assert not any(f"{folder}:" in told or f"{folder}/" in told for folder in two.values())


@pytest.mark.parametrize("command", ["plan", "merge"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method=task_aritmetic", "Did you mean 'task_arithmetic'?"),
        ("methd=soup", "Did you mean 'method'?"),
        ("output.dtpye=float16", "Did you mean 'dtype'?"),
        ("params.scal=2.0", "no such parameter"),
        ("seed=-1", "greater than or equal to 0"),
        ("output.rank=most", "most"),
        ("seed", "key=value"),
        ("evidence=somewhere", "uses none"),
    ],
)
def test_a_wrong_recipe_ends_with_two(cli, recipe, command, override, words):
    code, out, err = cli(command, "-c", recipe, override)
    assert code == 2
    assert out == ""
    assert words in errors(err)[0]
    assert not recipe.with_name("merged").exists()


def test_what_only_a_base_uses_is_refused_where_none_is_run(recipe):
    asked = ["resources.gpus_per_worker=2", "resources.device=cuda", "resources.dtype=bfloat16"]
    with pytest.raises(RecipeError) as error:
        refuse_unused(load_recipe(MergeRecipe, recipe, asked))
    assert [line.split(":")[0] for line in error.value.problems] == [
        "resources.dtype",
        "resources.gpus_per_worker",
    ]


def test_a_recipe_that_is_not_there(cli, tmp_path):
    code, _, err = cli("merge", "-c", tmp_path / "none.yaml")
    assert code == 2
    assert "no such recipe" in errors(err)[0]


def test_all_problems_of_a_recipe_are_told(cli, recipe):
    code, _, err = cli("merge", "-c", recipe, "seed=-1", "methd=x", "output.rnk=3")
    assert code == 2
    assert len(errors(err)) == 3


def test_a_cut_that_would_be_noticed_is_said_with_its_number(cli, recipe):
    code, _, err = cli("merge", "-c", recipe, "output.rank=1")
    report = json.loads((recipe.with_name("merged") / "merge_report.json").read_text())
    energy = f"{report['retained_energy']:.0%}"
    assert code == 0
    assert f"warning: output.rank: 1: the cut kept {energy} of the energy, " in err


def test_merge_writes_a_verified_folder(cli, recipe):
    code, out, err = cli("merge", "-c", recipe)
    assert (code, err) == (0, "")
    assert "2 adapters merged with soup in " in out
    assert ", rank 5, 100.00% of the energy kept, verified" in out
    names = {path.name for path in recipe.with_name("merged").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert names >= {"merge_report.json", "manifest.json", "run.json"}


def test_merge_warns_of_what_is_odd(cli, tmp_path, two):
    zero = save_lora(tmp_path / "zero", size=0.0)
    code, _, err = cli("merge", "-c", recipe_of(tmp_path / "r.yaml", {**two, "zero": zero}))
    assert code == 0
    assert [line for line in err.splitlines() if "all-zero change" in line]
    assert all(line.startswith("warning: ") for line in err.splitlines())


def test_a_merge_checked_on_its_base(cli, recipe, tiny_bert):
    assert cli("merge", "-c", recipe, f"base={tiny_bert}")[0] == 0
    run = json.loads((recipe.with_name("merged") / "run.json").read_text())
    assert run["checks"]["change_from_base"] > 0


def test_adapters_of_another_base_are_refused_before_the_merge(cli, tmp_path, tiny_bert):
    wide = dict.fromkeys(SHAPES, (24, 24))
    folder = save_lora(tmp_path / "wide", shapes=wide)
    recipe = recipe_of(tmp_path / "r.yaml", {"wide": folder}, base=str(tiny_bert))
    code, _, err = cli("merge", "-c", recipe)
    assert code == 3
    assert len(errors(err)) == 1, "one cause, one line"
    assert "24 x 24 but the base's 16 x 16 is expected" in errors(err)[0]
    assert f"And {len(SHAPES) - 1} more" in errors(err)[0]


def test_overrides_change_the_merge(cli, recipe):
    words = ["output.rank=2", "output.dtype=bfloat16", "method=task_arithmetic"]
    assert cli("merge", "-c", recipe, *words, "params.scale=0.5", "seed=7")[0] == 0
    target = recipe.with_name("merged")
    report = json.loads((target / "merge_report.json").read_text())
    assert (report["method"], report["seed"]) == ("task_arithmetic", 7)
    assert report["params"]["scale"] == 0.5
    tensors = load_file(target / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert max(t.shape[0] for n, t in tensors.items() if "lora_A" in n) == 2
    assert yaml.safe_load(recipe.read_text())["method"] == "soup"


def test_a_folder_of_somebody_else_loses_nothing(cli, recipe):
    theirs = recipe.with_name("merged")
    (theirs / "deep").mkdir(parents=True)
    (theirs / "deep" / "thesis.txt").write_text("years of work")
    code, _, err = cli("merge", "-c", recipe)
    assert code == 3
    assert "did not write" in errors(err)[0]
    assert (theirs / "deep" / "thesis.txt").read_text() == "years of work"
    assert len(list(theirs.rglob("*"))) == 2


def test_merging_twice_replaces_our_own_folder(cli, recipe):
    assert cli("merge", "-c", recipe)[0] == 0
    assert cli("merge", "-c", recipe, "output.rank=1")[0] == 0
    config = json.loads((recipe.with_name("merged") / "adapter_config.json").read_text())
    assert config["r"] == 1


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_an_output_that_is_an_input_is_refused(cli, tmp_path, recipe, two, command):
    assert cli("merge", "-c", recipe)[0] == 0
    ours = recipe.with_name("merged")  # a folder of ours, which an output may replace
    again = recipe_of(tmp_path / "again.yaml", {"one": ours, "a": two["a"]})
    (tmp_path / "link").symlink_to(tmp_path)
    before = (ours / "adapter_model.safetensors").read_bytes()
    for place in (ours, tmp_path / "link" / "merged", two["a"], ours / "inside"):
        code, _, err = cli(command, "-c", again, f"output.path={place}")
        assert code == 3
        assert "but inputs stay as they are" in errors(err)[0]
    assert (ours / "adapter_model.safetensors").read_bytes() == before
    assert not (ours / "inside").exists()


def test_adapters_of_one_folder_name_are_told_apart(cli, tmp_path):
    runs = [save_lora(tmp_path / run / "checkpoint-500", i) for i, run in enumerate("AB")]
    code, out, _ = cli("inspect", *runs, "--json")
    assert code == 0
    names = [one["name"] for one in json.loads(out)["adapters"]]
    assert names == ["A-checkpoint-500", "B-checkpoint-500"]


def test_adapters_that_share_no_module_are_refused_by_every_command(cli, tmp_path, two):
    bare = {name.removeprefix("encoder."): (16, 16) for name in SHAPES}
    folders = {"a": two["a"], "bare": save_lora(tmp_path / "bare", 3, shapes=bare)}
    recipe = recipe_of(tmp_path / "r.yaml", folders)
    for words in (["plan", "-c", recipe], ["merge", "-c", recipe], ["inspect", *folders.values()]):
        code, _, err = cli(*words)
        assert code == 3
        assert len(errors(err)) == 1
        assert "Only the prefix 'encoder.' differs" in errors(err)[0]


def test_an_adapter_of_weight_zero_is_named(cli, tmp_path, two):
    recipe = recipe_of(tmp_path / "r.yaml", two, params={"weights": {"a": 1.0, "b": 0.0}})
    for command in ("plan", "merge"):
        code, _, err = cli(command, "-c", recipe)
        assert code == 0
        assert "warning: b: weight 0, so not part of the merge." in err


def test_what_is_odd_about_many_adapters_is_told_once(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [save_lora(Path(f"t{i}"), i, lora_alpha=-2) for i in range(5)]
    code, _, err = cli("inspect", *folders)
    assert code == 0
    assert err.count("subtracted") == 1
    assert "(5 adapters alike)" in err


def test_one_cause_in_many_adapters_is_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        save_lora(Path(f"t{i}"), i, use_dora=True)
    code, _, err = cli("inspect", *(f"t{i}" for i in range(5)))
    assert code == 3
    assert len(errors(err)) == 1
    assert errors(err)[0].startswith("error: t0/adapter_config.json: use_dora: true")
    assert errors(err)[0].endswith("(And 4 more.)")


def test_one_base_under_several_names_merges_at_the_users_word(cli, tmp_path):
    bases = ("meta/m", "unsloth/m-bnb-4bit", "/data/m")
    folders = {
        f"t{i}": save_lora(tmp_path / f"t{i}", i, base_model_name_or_path=base)
        for i, base in enumerate(bases)
    }
    recipe = recipe_of(tmp_path / "r.yaml", folders)
    code, _, err = cli("merge", "-c", recipe)
    assert code == 3
    assert "same_base: true" in errors(err)[0]
    code, _, err = cli("merge", "-c", recipe, "same_base=true")
    assert code == 0
    assert "taken for 'meta/m', as the recipe says" in err
    config = json.loads((recipe.with_name("merged") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta/m"
    assert cli("reproduce", recipe.with_name("merged"))[0] == 0


def test_what_a_library_warns_users_of_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    quiet_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("a base\nis odd", stacklevel=1)
        warnings.warn("for programmers", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: a base\\x0ais odd\n"


def test_a_damaged_base_is_told(cli, tmp_path, recipe, tiny_bert):
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("value.weight"))
    save_file({key: x for key, x in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="lacks 1 weights of BertModel.*drawn at random"):
        assert cli("merge", "-c", recipe, f"base={base}")[0] == 0
    for bad in (float("nan"), float("inf")):
        save_file({**tensors, name: torch.full_like(tensors[name], bad)}, file, {"format": "pt"})
        code, _, err = cli(
            "merge", "-c", recipe, f"base={base}", f"output.path={tmp_path / 'never'}"
        )
        assert code == 3
        assert f"{name}: NaN or infinity but finite weights are expected" in err


def test_verify(cli, recipe, tiny_bert):
    cli("merge", "-c", recipe)
    target = recipe.with_name("merged")
    code, out, _ = cli("verify", target)
    assert code == 0
    assert "intact" in out
    assert cli("verify", target, "--base", tiny_bert)[0] == 0
    weights = target / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, _, err = cli("verify", target)
    assert code == 3
    assert "adapter_model.safetensors: sha256 differs" in errors(err)[0]


def test_reproduce(cli, recipe, two):
    cli("merge", "-c", recipe, "method=svd", "output.dtype=float16")
    target = recipe.with_name("merged")
    code, out, _ = cli("reproduce", target)
    assert code == 0
    assert "5 files equal" in out
    save_lora(two["a"], 99)
    code, _, err = cli("reproduce", target)
    assert code == 3
    assert "is not the adapter this merge was made from" in errors(err)[0]


def test_adapters_listed_in_any_order_reproduce(cli, tmp_path, two):
    recipe = recipe_of(tmp_path / "back.yaml", dict(reversed(two.items())))
    assert cli("merge", "-c", recipe)[0] == 0
    assert cli("reproduce", tmp_path / "merged")[0] == 0


def test_kept_layers_come_along(cli, tmp_path, two):
    save_lora(two["a"], 1, saved={"head.weight": torch.ones(3, 16)})
    recipe = recipe_of(tmp_path / "r.yaml", two)
    code, _, err = cli("merge", "-c", recipe)
    assert code == 3
    assert "modules_to_save" in errors(err)[0]
    assert cli("merge", "-c", recipe, "modules_to_save=keep")[0] == 0
    kept = load_file(tmp_path / "merged" / "saved_modules" / "a.safetensors")
    assert torch.equal(kept["head.weight"], torch.ones(3, 16))
    assert cli("reproduce", tmp_path / "merged")[0] == 0


def test_a_traceback_is_shown_on_demand_only(cli, recipe, two):
    shutil.rmtree(two["a"])
    _, _, err = cli("merge", "-c", recipe)
    assert "Traceback" not in err
    code, _, err = cli("merge", "-c", recipe, "--debug")
    assert code == 3
    assert err.startswith("error: ")
    assert "Traceback (most recent call last)" in err


def test_a_full_disk_ends_with_four(cli, recipe):
    """A limit on the size of files stands in for a full disk."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)); "
        "from icm_ray.cli import main; sys.argv[0] = 'icm-ray'; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "merge", "-c", str(recipe)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 4, done.stderr
    assert "error: " in done.stderr
    assert not recipe.with_name("merged").exists()


def test_the_module_is_the_program(recipe):
    done = subprocess.run(
        [sys.executable, "-m", "icm_ray", "merge", "-c", str(recipe), "method=nsk"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert errors(done.stderr)[0].startswith("error: method: 'nsk' is not known")


def test_a_command_that_is_none(cli):
    assert cli("mrege")[0] == 2


@pytest.mark.parametrize("name", METHODS)
def test_one_method_in_full(cli, name):
    code, out, _ = cli("methods", name)
    assert code == 0
    row = METHODS[name]
    assert row.formula in out
    assert all(parameter in out for parameter in row.parameters())
    assert all(reason[:20] in out for reason in row.exempt.values())
    assert all(kind in out for kind in row.takes)


def test_one_method_in_full_says_ranges_presets_and_the_docstring(cli):
    out = cli("methods", "linear")[1]
    assert "peft | nsc" in out
    assert "one number or list of numbers per task or list" in " ".join(out.split())
    assert "unequal ranks are padded with zeros" in out
    assert list(json.loads(cli("methods", "linear", "--json")[1])) == ["linear"]


def test_a_method_that_is_none_has_no_page(cli):
    code, out, err = cli("methods", "linaer")
    assert (code, out) == (2, "")
    assert "Did you mean 'linear'?" in errors(err)[0]


PEFT_CALL = "model.add_weighted_adapter(['a', 'b'], [1.0, 0.5], 'both', 'cat')\n"


def test_an_imported_recipe_merges(cli, tmp_path, two):
    program = "".join(f"model.load_adapter({str(p)!r}, {n!r})\n" for n, p in two.items())
    source, target = tmp_path / "merge.py", tmp_path / "recipe.yaml"
    source.write_text(program + PEFT_CALL)
    code, out, err = cli("import-recipe", source, "-o", target)
    assert (code, err) == (0, "")
    assert f"icm-ray plan -c {target}" in out
    assert cli("merge", "-c", target, f"output.path={tmp_path / 'merged'}")[0] == 0
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["params"]["weights"] == {"a": 1.0, "b": 0.5}


def test_an_imported_recipe_goes_to_stdout_and_its_warnings_to_stderr(cli, tmp_path):
    source = tmp_path / "merge.py"
    source.write_text(PEFT_CALL)
    code, out, err = cli("import-recipe", source)
    assert code == 0
    assert yaml.safe_load(out)["method"] == "cat"
    assert err.count("warning: adapters: ") == 2


def test_an_imported_recipe_overwrites_only_when_told(cli, tmp_path):
    source, target = tmp_path / "merge.py", tmp_path / "recipe.yaml"
    source.write_text(PEFT_CALL)
    target.write_text("mine")
    code, out, err = cli("import-recipe", source, "-o", target)
    assert (code, out) == (2, "")
    assert "--overwrite" in errors(err)[0]
    assert target.read_text() == "mine"
    assert cli("import-recipe", source, "-o", target, "--overwrite")[0] == 0
    assert yaml.safe_load(target.read_text())["method"] == "cat"
    assert cli("import-recipe", source, "-o", tmp_path / "none" / "x.yaml")[0] == 2


def test_what_cannot_be_imported_ends_with_two(cli, tmp_path):
    source = tmp_path / "merge.py"
    source.write_text("model.add_weighted_adapter(names, [1.0, 0.5], 'm', 'ctu')\n")
    code, out, err = cli("import-recipe", source)
    assert (code, out) == (2, "")
    assert len(errors(err)) == 2


def test_a_quoted_home_is_the_home_everywhere(cli, tmp_path, two, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [f"~/{path.relative_to(tmp_path)}" for path in two.values()]
    assert cli("merge", *names, "--method", "soup", "-o", "~/at_home")[0] == 0
    assert (tmp_path / "at_home").is_dir()
    for command in ("verify", "reproduce"):
        assert cli(command, "~/at_home")[0] == 0
    assert cli("inspect", *names)[0] == 0
    assert cli("export", "~/at_home", "--format", "mlx", "-o", "~/exported")[0] == 0
    assert (tmp_path / "exported").is_dir()
    assert cli("push", "~/at_home", "--to", "org/name", "--dry-run")[0] == 0
    (tmp_path / "merge.py").write_text(PEFT_CALL)
    assert cli("import-recipe", "~/merge.py", "-o", "~/recipe.yaml")[0] == 0
    assert (tmp_path / "recipe.yaml").is_file()
