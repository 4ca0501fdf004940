"""Recipes: strict, quoted back safely, and every one that is shipped can be loaded."""

from pathlib import Path

import pytest

from icm_ray import config
from icm_ray.config import (
    FinetuneRecipe,
    MergeRecipe,
    PipelineRecipe,
    PrepareRecipe,
    Recipe,
    folder_names,
    loading,
)
from icm_ray.config.loading import load_recipe
from icm_ray.errors import RecipeError
from icm_ray.storage import STORAGE_VARIABLE, SUBMITTED_JOB_VARIABLE, output_folder

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PLAIN = """\
adapters: [{name: a, path: here}, {name: b, path: there}]
method: soup
output: {path: out}
"""
PIPELINE = "name: x\noutput: out\nmethods: [{method: soup}]\n"


@pytest.fixture
def load(tmp_path: Path):
    """Return a function (text, overrides) -> recipe."""

    def call(
        text: str | bytes = PLAIN, *overrides: str, kind: type[Recipe] = MergeRecipe
    ) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(kind, path, overrides)

    return call


@pytest.fixture
def refused(load):
    """Return a function (text, overrides) -> the problems it is refused with."""

    def call(*arguments: str | bytes, kind: type[Recipe] = MergeRecipe) -> str:
        with pytest.raises(RecipeError) as caught:
            load(*arguments, kind=kind)
        return str(caught.value)

    return call


def test_jobs_that_gather_no_grams_refuse_a_form_of_them(refused) -> None:
    said = "resources.grams: this job gathers no Gram statistics"
    text = "output: out\nresources: {grams: diagonal}\n"
    for kind in (FinetuneRecipe, PrepareRecipe):
        assert said in refused(text, kind=kind)


def test_there_are_recipes_to_check() -> None:
    assert len(CONFIGS) >= 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_recipe_loads(path: Path) -> None:
    kind = getattr(config, f"{path.parent.name.title().replace('_', '')}Recipe")
    recipe = load_recipe(kind, path)
    assert recipe.output_path.startswith("runs/")
    assert (ROOT / "jobs" / f"{path.parent.name}.py").is_file()
    assert path.read_text().startswith("#"), "says what it is for"


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name in ("merge", "pipeline")])
def test_methods_and_parameters_of_shipped_recipes_exist(path: Path) -> None:
    from icm_ray.merging.cut import RankRule
    from icm_ray.methods import find_method

    if path.parent.name == "merge":
        recipe = load_recipe(MergeRecipe, path)
        names = [ref.name for ref in recipe.adapters]
        find_method(recipe.method).bind(recipe.params, names)
        RankRule.parse(recipe.output.rank, "exact", 8)
    else:
        for row in load_recipe(PipelineRecipe, path).methods:
            names = row.tasks or ["a", "b"]
            for key, values in row.grid.items():
                for value in values:
                    find_method(row.method).bind({**row.params, key: value}, names)
            find_method(row.method).bind(row.params, names)
            RankRule.parse(row.rank, "exact", 8)


def test_plain_values_and_defaults(load) -> None:
    recipe = load()
    assert [(ref.name, ref.path) for ref in recipe.adapters] == [("a", "here"), ("b", "there")]
    assert (recipe.output.path, recipe.output.rank, recipe.seed) == ("out", None, 0)
    assert recipe.output_path == "out"
    assert load(PIPELINE, kind=PipelineRecipe).output_path == "out"


def test_recipes_cannot_be_changed_later(load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 1


def test_overrides_reach_any_depth(load) -> None:
    recipe = load(
        PLAIN,
        "output.rank=8",
        "seed=3",
        "adapters[0].path=elsewhere",
        "params.scale=1e-3",
        "params.weights.task-1=0.5",
        "resources.custom={big: 1}",
        "output.path=a b=c",
    )
    assert recipe.output.rank == 8
    assert recipe.seed == 3
    assert [ref.path for ref in recipe.adapters] == ["elsewhere", "there"]
    assert recipe.params == {"scale": 0.001, "weights": {"task-1": 0.5}}
    assert recipe.resources.custom == {"big": 1.0}
    assert recipe.output.path == "a b=c"
    assert load(PLAIN + "seed: 4\n", "seed=5").seed == 5
    assert load(PLAIN.replace("}\n", ", rank: 4}\n"), "output.rank=null").output.rank is None


@pytest.mark.parametrize(
    ("extra", "where", "near"),
    [
        ("adaptrs: []", "adaptrs", "adapters"),
        ("resources: {wrkers: 1}", "resources.wrkers", "workers"),
        ("data: {sute: text}", "data.sute", "suite"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(refused, extra, where, near) -> None:
    told = refused(PLAIN + extra + "\n")
    assert f"r.yaml: {where}: unknown key. Did you mean {near!r}? Known: " in told


def test_unknown_keys_inside_lists_and_overrides(refused) -> None:
    assert "adapters.1.pth: unknown key. Did you mean 'path'?" in refused(
        PLAIN.replace("{name: b,", "{name: b, pth: x,")
    )
    assert "methods.0.parms: unknown key. Did you mean 'params'?" in refused(
        PIPELINE.replace("soup", "soup, parms: {}"), kind=PipelineRecipe
    )
    assert "training.lorra_lr: unknown key. Did you mean 'lora_lr'?" in refused(
        "output: x", "training.lorra_lr=1.0", kind=FinetuneRecipe
    )
    assert "output.rnk: unknown key. Did you mean 'rank'?" in refused(PLAIN, "output.rnk=8")


def test_all_problems_are_told_at_once(refused) -> None:
    told = refused(PLAIN.replace("method: soup\n", "") + "seed: -1\nrezources: {}\n")
    assert len(told.splitlines()) == 3
    assert "method: missing. Add it." in told
    assert "seed: -1: Input should be greater than or equal to 0." in told


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("method: soup", "method: 7"),
        ("name: a", "name: ../a"),
        ("name: a", "name: ''"),
        ("path: here", "path: ''"),
        ("method: soup", "method: soup\nseed: true"),
        ("method: soup", "method: soup\nseed: 1.0"),
        ("method: soup", "method: soup\nresources: {timeout_seconds: 0}"),
        ("method: soup", "method: soup\nresources: {device: cuda;rm}"),
        ("method: soup", "method: soup\nresources: {gpus_per_worker: 1.5, device: cuda}"),
        ("method: soup", "method: soup\nresources: {gpus_per_worker: 2, device: 'cuda:1'}"),
        ("method: soup", "method: soup\nresources: {gpus_per_worker: 2}"),
        ("method: soup", "method: soup\nresources: {grams: low_rank:0}"),
        ("method: soup", "method: soup\nmodules_to_save: maybe"),
        ("path: out", "path: out, rank: [8]"),
        ("[{name: a, path: here}, {name: b, path: there}]", "[]"),
    ],
)
def test_wrong_types_and_ranges_are_refused(refused, old: str, new: str) -> None:
    assert old in PLAIN
    refused(PLAIN.replace(old, new))


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-1", 0.1), ("1E3", 1e3), ("-2e+2", -200.0), (".5e1", 5.0), ("1.e1", 10)],
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, number: float) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(PLAIN + f"params: {{scale: {text}, word: e1e-1, quoted: '{text}'}}\n")
    params = load_recipe(MergeRecipe, file).params
    assert params == {"scale": number, "word": "e1e-1", "quoted": text}


def test_paths_under_the_home_folder_are_expanded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text(PLAIN.replace("path: here", "path: ~/here"))
    recipe = load_recipe(MergeRecipe, "~/r.yaml", ["output.path=~/out", "evidence=~/e"])
    assert recipe.adapters[0].path == f"{tmp_path}/here"
    assert (recipe.output.path, recipe.evidence) == (f"{tmp_path}/out", f"{tmp_path}/e")


def test_adapters_may_be_paths_alone(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    paths = "[runs/law/, runA/checkpoint-500, runB/checkpoint-500, 'my (new) one']"
    file.write_text(f"adapters: {paths}\nmethod: soup\noutput: {{path: out}}\n")
    refs = load_recipe(MergeRecipe, file).adapters
    names = ["law", "runA-checkpoint-500", "runB-checkpoint-500", "my__new__one"]
    assert [ref.name for ref in refs] == names
    assert refs[0].path == "runs/law/"


def test_one_folder_twice_keeps_one_name() -> None:
    assert len(set(folder_names(["a/b", "a/b/", "./a/b"]))) == 1
    assert folder_names(["/home/me@corp/law", "/home/me@corp/med"]) == ["law", "med"]
    assert folder_names(["org/law@refs/pr/1", "x/med.safetensors"]) == ["law", "med"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "list but a table of keys is expected"),
        ("", "NoneType but a table of keys is expected"),
        ("words", "str but a table of keys is expected"),
        ("1: 2", "a table of keys is expected"),
        (b"\xff\xfea\x00", "not UTF-8"),
        ("method: soup\nparams: {\n", "line 3: not plain YAML"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: &x {b: 1}\n<<: *x\n", "aliases"),
        ("a: 1\n---\nb: 2\n", "not plain YAML"),
        ('a: "\x07"\n', "not plain YAML"),
        ("a: " + "[" * 400_000, "nested too deeply"),
        (PLAIN + "params: {x: " + "[" * 400 + "]" * 400 + "}", "nested too deeply"),
        (PLAIN + "params: {x: 1, y: 2, x: 3}\n", "line 4: x: twice"),
        (PLAIN + "method: svd\n", "line 4: method: twice"),
        (PLAIN + "params: {x: [{y: 1}, {y: 1}], y: {x: 1}}\nmethods: 1\n", "methods: unknown"),
        (PLAIN + "params: {x: 2024-01-01}\n", "plain YAML values"),
        (PLAIN + "params: {x: 2024-13-45}\n", "not plain YAML (month must be"),
        (PLAIN + "seed: " + "1" * 5000, "not plain YAML (Exceeds the limit"),
    ],
)
def test_what_is_no_plain_table_is_refused(refused, text, words) -> None:
    assert words in refused(text)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [ls]", "!!python/name:os.system x", "!mine {}"]
)
def test_tags_that_would_run_code_are_refused(refused, tag: str) -> None:
    assert "not plain YAML (could not determine a constructor" in refused(
        f"{PLAIN}params: {{x: {tag}}}\n"
    )


def test_interpolations_stay_text(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    recipe = load(PLAIN + "params: {x: '${oc.env:SECRET}', y: '${method}'}\n")
    assert recipe.params == {"x": "${oc.env:SECRET}", "y": "${method}"}


def test_files_that_are_missing_or_huge_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(MergeRecipe, tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(MergeRecipe, tmp_path)
    (tmp_path / "big.yaml").write_text(PLAIN + "#" * loading.MAX_RECIPE_BYTES)
    with pytest.raises(RecipeError, match="A recipe is a short text"):
        load_recipe(MergeRecipe, tmp_path / "big.yaml")


@pytest.mark.parametrize(
    "override",
    ["storage={key: hunter2}", 'storage="hunter2', "method.x=hunter2", "seed=hunter2", "=hunter2"],
)
def test_secrets_are_not_repeated(refused, override: str) -> None:
    assert "hunter2" not in refused(PLAIN, override)
    key = override.partition("=")[0].partition(".")[0]
    assert "hunter2" not in refused(f"{PLAIN}adapterz: {{{key or 'x'}: hunter2}}\n")
    assert "hunter2" not in refused(PLAIN.replace("soup", "[hunter2]"))


@pytest.mark.parametrize("override", ["seed", "seed:1", "0seed=1", "a b=1"])
def test_words_that_set_nothing_are_refused(refused, override: str) -> None:
    assert "not of the form key=value. Write for example seed=1." in refused(PLAIN, override)


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (STORAGE_VARIABLE, SUBMITTED_JOB_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_relative_outputs_are_in_the_current_folder(load, no_environment, tmp_path: Path) -> None:
    no_environment.chdir(tmp_path)
    assert output_folder(load(), "out") == tmp_path / "out"
    assert output_folder(load(), "/abs/out") == Path("/abs/out")


def test_storage_of_the_recipe_wins_over_the_environment(load, no_environment) -> None:
    no_environment.setenv(STORAGE_VARIABLE, "/from/environment")
    assert output_folder(load(), "out") == Path("/from/environment/out")
    assert output_folder(load(PLAIN + "storage: /from/recipe\n"), "out") == Path("/from/recipe/out")


def test_submitted_jobs_need_a_place_that_stays(load, no_environment) -> None:
    no_environment.setenv(SUBMITTED_JOB_VARIABLE, "{}")
    with pytest.raises(RecipeError, match="'out' is relative, but a submitted job runs in a copy"):
        output_folder(load(), "out")
    with pytest.raises(RecipeError, match="is relative"):
        output_folder(load(PLAIN + "storage: runs\n"), "out")
    assert output_folder(load(), "/abs") == Path("/abs")
    assert output_folder(load(PLAIN + "storage: /s\n"), "out") == Path("/s/out")
