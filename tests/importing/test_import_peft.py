"""PEFT's merge call becomes a recipe that gives PEFT's numbers; the file itself never runs."""

import warnings

import pytest
import torch
from command_samples import SHAPES, save_lora

from icm_ray import RecipeError, load_adapter, merge
from icm_ray.config import MergeRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.importing import import_recipe, recipe_text
from icm_ray.importing.counterparts import COMBINATIONS

LOADING = """
from peft import PeftModel
model = PeftModel.from_pretrained(base, {a!r}, adapter_name="a")
model.load_adapter({b!r}, adapter_name="b")
"""


@pytest.fixture
def read(tmp_path):
    """Return a function that writes a program, imports it and says it as a loaded recipe."""

    def run(program, name="merge.py"):
        path = tmp_path / name
        path.write_text(program)
        imported = import_recipe(path)
        (tmp_path / "recipe.yaml").write_text(recipe_text(imported))
        return load_recipe(MergeRecipe, tmp_path / "recipe.yaml"), imported

    return run


def problems_of(read, program):
    with pytest.raises(RecipeError) as caught:
        read(program)
    return caught.value.problems


def call(arguments="", adapters="['a', 'b']", weights="[1.0, 0.5]"):
    return f"model.add_weighted_adapter({adapters}, {weights}, 'both', {arguments})\n"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return {name: save_lora(folder / name, seed) for seed, name in enumerate("ab")}


def peft_deltas(base, two, **arguments):
    """Return what PEFT merges of two adapters on a tiny BERT, by module."""
    from peft import PeftModel
    from transformers import BertModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about a density of 1
        model = PeftModel.from_pretrained(BertModel.from_pretrained(base), two["a"], "a")
        model.load_adapter(two["b"], "b")
        model.add_weighted_adapter(["a", "b"], adapter_name="both", **arguments)
    layers = {m: model.get_submodule(f"base_model.model.{m}") for m in SHAPES}
    return {m: layer.get_delta_weight("both").detach() for m, layer in layers.items()}


CASES = [
    ("linear", {}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 3}),
    ("ties", {"density": 0.4}),
    ("ties_svd", {"density": 0.4}),
    ("ties_svd", {"density": 0.4, "svd_rank": 3}),
    ("magnitude_prune", {"density": 0.4}),
    ("magnitude_prune_svd", {"density": 0.4}),
    # Masks are drawn differently, so only where everything is kept can numbers agree.
    ("dare_linear", {"density": 1.0}),
    ("dare_linear_svd", {"density": 1.0}),
    ("dare_ties", {"density": 1.0}),
    ("dare_ties_svd", {"density": 1.0}),
]


@pytest.mark.parametrize("weights", [[1.0, 0.5], [0.7, -0.3]])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda value: str(value))
def test_the_imported_recipe_gives_pefts_numbers(read, tiny_bert, two, kind, options, weights):
    arguments = {"combination_type": kind, **options}
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    program = LOADING.format(a=str(two["a"]), b=str(two["b"])) + call(written, weights=weights)
    recipe, _ = read(program)
    adapters = [load_adapter(ref.path, ref.name) for ref in recipe.adapters]
    rank = recipe.output.rank
    found = merge(adapters, recipe.method, params=recipe.params, output_rank=rank).adapter
    expected = peft_deltas(tiny_bert, two, weights=weights, **arguments)
    for module, delta in expected.items():
        torch.testing.assert_close(found.modules[module].delta(), delta, rtol=1e-4, atol=1e-5)


def test_pefts_merges_of_rslora_are_too_large_as_the_recipe_says(read, tiny_bert, tmp_path):
    rs = {n: save_lora(tmp_path / n, s, use_rslora=True) for s, n in enumerate("ab")}
    program = LOADING.format(a=str(rs["a"]), b=str(rs["b"])) + call("'cat'")
    recipe, imported = read(program)
    assert "rsLoRA" in recipe_text(imported)
    adapters = [load_adapter(ref.path, ref.name) for ref in recipe.adapters]
    found = merge(adapters, recipe.method, params=recipe.params).adapter
    theirs = peft_deltas(tiny_bert, rs, weights=[1.0, 0.5], combination_type="cat")
    for module, delta in theirs.items():
        torch.testing.assert_close(2.0 * found.modules[module].delta(), delta)  # sqrt(2 + 2)


def test_the_recipe_says_everything(read, two):
    program = LOADING.format(a=str(two["a"]), b="hub/b") + call(
        "combination_type='svd', svd_rank=3"
    )
    recipe, imported = read(program)
    assert [(r.name, r.path) for r in recipe.adapters] == [("a", str(two["a"])), ("b", "hub/b")]
    assert (recipe.method, recipe.output.rank, recipe.output.path) == ("svd", 3, "merged/both")
    assert recipe.params == {"weights": {"a": 1.0, "b": 0.5}}
    assert [line for line in imported.warnings if "hf download hub/b" in line]
    assert not [line for line in imported.warnings if line.startswith("adapters: a:")]


@pytest.mark.parametrize("kind", [k for k, row in COMBINATIONS.items() if row.preset])
def test_how_each_type_differs_is_said(kind):
    row = COMBINATIONS[kind]
    told = " ".join(row.differences)
    assert ("B_i A_j" in told) == (not kind.endswith("svd"))
    assert ("drawn anew" in told) == kind.startswith("dare")


def test_names_that_are_set_once_are_followed(read):
    program = (
        "names: list = []\nadapters = ['sql', 'ad copy']\nweights = [2, 1/4]\n"
        "kind = 'cat'\n"
        "model.add_weighted_adapter(adapters, weights, 'm', combination_type=kind)\n"
    )
    recipe, imported = read(program)
    assert recipe.params["weights"] == {"sql": 2.0, "ad-copy": 0.25}
    assert recipe.method == "cat"
    assert [ref.path for ref in recipe.adapters] == ["FILL_IN/sql", "FILL_IN/ad-copy"]
    told = "\n".join(imported.warnings)
    assert "'ad copy' is called 'ad-copy' here" in told
    assert told.count("does not say its path") == 2


def test_defaults_are_pefts(read):
    recipe, _ = read("add_weighted_adapter(['x', 'y'], [1/2] * 2, adapter_name=name)")
    assert (recipe.method, recipe.output.rank) == ("svd", None)
    assert recipe.params == {"weights": {"x": 0.5, "y": 0.5}}
    assert recipe.output.path == "merged/merge"


def test_one_adapter_is_merged_linearly(read):
    recipe, imported = read(call("'ties_svd', density=0.2", "['a']", "[-2]"))
    assert recipe.method == "linear"
    assert recipe.params == {"preset": "peft", "weights": {"a": -2.0}}
    assert any("linear for one adapter" in line for line in imported.warnings)


def test_a_snippet_that_is_indented_and_no_py_file(read):
    assert read("    " + call("'cat'"), "snippet.txt")[0].method == "cat"


def test_all_ways_to_load_an_adapter(read):
    program = """
m = PeftModelForCausalLM.from_pretrained(base, model_id="p/first")
m.load_adapter(adapter_name="second", model_id="p/repo", subfolder="x")
m.load_adapter("p/third", "third", is_trainable=False)
peft.PeftModel.from_pretrained(base, "p/fifth", adapter_name="fifth")
m.load_adapter(os.environ["SECRET"], "fourth")
for n in names:
    m.load_adapter(f"p/{n}", n)
AutoModel.from_pretrained("a", "b", "third")
m.add_weighted_adapter(["default", "second", "third", "fourth", "fifth"], [1] * 5, "m", "cat")
"""
    assert [ref.path for ref in read(program)[0].adapters] == [
        "p/first",
        "p/repo/x",
        "p/third",
        "FILL_IN/fourth",
        "p/fifth",
    ]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('hello')", "no call of add_weighted_adapter"),
        (call() + call(), "2 calls (lines 1, 2)"),
        (call("density=0.5, densty=1"), "densty: add_weighted_adapter has no such argument."),
        (call("'tie'"), "Did you mean 'ties'?"),
        (call("['cat']"), "combination_type: PEFT 0.21 has"),
        (call("**options"), "**: what it holds is not known"),
        (call("svd_clamp=0.9"), "svd_clamp: there is no counterpart"),
        (call("svd_rank=2.5"), "svd_rank: a positive whole number"),
        (call("svd_rank=True"), "svd_rank: a positive whole number"),
        (call("'ties', density=0.5, majority_sign_method='frequency'"), "majority_sign_method"),
        (call("'ties'"), "density: a number is expected"),
        (call("'ties', density=d"), "density: its value is computed"),
        (call(weights="[1.0]"), "1 numbers but 2 adapters"),
        (call(weights="[1.0, float('nan')]"), "weights: its value is computed"),
        (call(weights="[1.0, 1e999]"), "weights: a list of numbers"),
        (call(weights="[1.0, True]"), "weights: a list of numbers"),
        (call(weights="[1.0, 1/0]"), "weights: its value is computed"),
        (call(weights="[1.0] * 10**9"), "weights: its value is computed"),
        (call(adapters="['a', 'a']"), "named twice"),
        (call(adapters="[]"), "a list of adapter names"),
        (call(adapters="names"), "adapters: its value is computed"),
        ("names = ['a']\nnames = ['b']\n" + call(adapters="names"), "adapters: its value"),
        ("names = ['a']\nnames.append('b')\n" + call(adapters="names"), "adapters: its value"),
        ("w = [1, 2]\nw[0] = 7\n" + call(weights="w"), "weights: its value is computed"),
        ("w = [1, 2]\ndef f(w):\n  " + call(weights="w"), "weights: its value is computed"),
        ("m.load_adapter('x', 'a')\nm.load_adapter('y', 'a')\n" + call(), "loaded twice"),
        ("%pip install peft\n" + call(), "line 1: not plain Python"),
        ("x = '\x00'\n" + call(), "not plain Python"),
        ("x = " + "(" * 300 + ")" * 300 + "\n" + call(), "not plain Python"),
        ("x = " + "-" * 90_000 + "1\n" + call(), "not plain Python"),
    ],
)
def test_what_cannot_be_carried_over(read, program, words):
    told = problems_of(read, program)
    assert any(words in line for line in told), told


def test_every_problem_is_told_at_once(read):
    told = problems_of(read, call("'tie', svd_rnk=2, density=d", weights="[1]"))
    assert len(told) == 4
    assert all(": line 1: " in line for line in told)


def test_nothing_of_the_file_runs(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = """
import os, pathlib
pathlib.Path("ran").touch()
@os.system("touch ran")
class A(metaclass=print("ran")): pass
model.add_weighted_adapter(["a", "b"], [__import__("os").system("touch ran"), 1], "m", "cat")
"""
    (told,) = problems_of(read, program)
    assert "weights: its value is computed" in told
    assert "system" not in told
    assert not (tmp_path / "ran").exists()


def test_a_long_chain_of_attributes(read):
    chain = "x" + ".a" * 400
    program = f"{chain}.from_pretrained(base, 'p', 'a')\n{chain}.load_adapter('q', 'b')\n"
    recipe, _ = read(program + call("'cat'"))
    assert [ref.path for ref in recipe.adapters] == ["FILL_IN/a", "q"]


def test_names_of_names_cannot_grow(read):
    lines = ["x0 = ['a', 'a']"] + [f"x{i} = [x{i - 1}, x{i - 1}]" for i in range(1, 60)]
    assert problems_of(read, "\n".join(lines) + "\n" + call(adapters="x59"))


def test_a_huge_program(tmp_path):
    path = tmp_path / "huge.py"
    path.write_text("x = 1\n" * 200_000)
    with pytest.raises(RecipeError, match="over 1000000 bytes"):
        import_recipe(path)
