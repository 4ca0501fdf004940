"""mergekit's YAML becomes a recipe that means the same, or is refused with every reason."""

import time

import pytest
import torch
import yaml

from icm_ray import METHODS, RecipeError, merge
from icm_ray.config import MergeRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.importing import import_recipe, recipe_text, writing
from icm_ray.importing.counterparts import COUNTERPARTS
from icm_ray.importing.mergekit import read_mergekit

BASE = "meta/llama"


def model(adapter=None, **parameters):
    entry = {"model": f"{BASE}+{adapter}" if adapter else BASE}
    return {**entry, **({"parameters": parameters} if parameters else {})}


def content(method="task_arithmetic", **keys):
    values = {"merge_method": method, "base_model": BASE}
    values["models"] = [model("lora/math", weight=0.5), model("lora/code", weight=1.0)]
    return {**values, **keys}


@pytest.fixture
def read(tmp_path):
    """Return a function that writes a file, imports it and says it as a loaded recipe."""

    def run(values):
        path = tmp_path / "mix.yml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        imported = read_mergekit(path)
        (tmp_path / "recipe.yaml").write_text(recipe_text(imported))
        recipe = load_recipe(MergeRecipe, tmp_path / "recipe.yaml")
        assert recipe.params == imported.params
        return recipe, imported

    return run


def problems_of(read, values):
    with pytest.raises(RecipeError) as caught:
        read(values)
    return caught.value.problems


def test_task_arithmetic(read):
    recipe, imported = read(content(parameters={"lambda": 0.7}, dtype="bfloat16"))
    assert [(ref.name, ref.path) for ref in recipe.adapters] == [
        ("math", "lora/math"),
        ("code", "lora/code"),
    ]
    assert recipe.method == "task_arithmetic"
    assert recipe.params == {"weights": {"math": 0.5, "code": 1.0}, "scale": 0.7}
    assert (recipe.base, recipe.output.dtype, recipe.output.rank) == (None, "bfloat16", None)
    text = recipe_text(imported)
    assert "# base: meta/llama" in text
    assert "the base is never loaded" in text
    assert "mergekit's `lambda`" in text


def test_linear_weights_are_divided_by_their_sum_the_base_included(read):
    models = [model("a", weight=1), model("b", weight=2), model(weight=1)]
    recipe, imported = read(content("linear", models=models, base_model=None))
    assert recipe.method == "soup"
    assert recipe.params == {"weights": {"a": 0.25, "b": 0.5}}
    assert "divided by their sum" in recipe_text(imported)


def test_linear_that_would_scale_the_base_is_refused(read):
    plain = {"normalize": False}
    (told,) = problems_of(read, content("linear", parameters=plain))
    assert "add up to 1.5" in told
    models = [model("a", weight=1.5), model("b", weight=-0.5)]
    assert (
        read(content("linear", models=models, parameters=plain))[0].params["weights"]["b"] == -0.5
    )


def test_the_base_among_the_models_is_no_task_vector(read):
    models = [model(), *content()["models"]]
    assert set(read(content(models=models))[0].params["weights"]) == {"math", "code"}


@pytest.mark.parametrize(
    ("method", "own", "expected"),
    [
        ("ties", {}, {"aggregate": "mean", "preset": "mergekit", "density": 0.4}),
        ("ties", {"normalize": False}, {"aggregate": "sum", "preset": "mergekit", "density": 0.4}),
        ("dare_ties", {}, {"aggregate": "sum", "preset": "mergekit", "density": 0.4}),
        ("dare_linear", {}, {"preset": "dare", "density": 0.4, "scale": 1.0}),
        ("dare_linear", {"rescale": False}, {"preset": "dare", "density": 0.4, "scale": 0.4}),
        ("breadcrumbs", {}, {"density": 0.4, "gamma": 0.01}),
        ("della", {"normalize": False}, {"density": 0.4, "epsilon": 0.3, "aggregate": "sum"}),
    ],
)
def test_sparse_methods(read, method, own, expected):
    recipe, imported = read(content(method, parameters={"density": 0.4, **own}))
    assert recipe.method == COUNTERPARTS[method].method
    assert recipe.params.items() >= expected.items()
    assert recipe.params["weights"] == {"math": 0.5, "code": 1.0}
    assert "output.rank" in recipe_text(imported)


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_equal_weights_divide_out_of_a_mean_by_number(read, method):
    parameters = {"density": 0.4, "normalize": True}
    (told,) = problems_of(read, content(method, parameters=parameters))
    assert "unequal weights" in told
    models = [model("a", weight=0.3), model("b", weight=0.3)]
    recipe, _ = read(content(method, models=models, parameters=parameters))
    assert recipe.params["weights"] == {"a": 1.0, "b": 1.0}
    assert recipe.params["aggregate"] == "mean"


@pytest.mark.parametrize("epsilon", [0.4, 0.7])
def test_della_probabilities_stay_inside_0_and_1(read, epsilon):
    parameters = {"density": 0.4, "epsilon": epsilon, "normalize": False}
    (told,) = problems_of(read, content("della", parameters=parameters))
    assert "density +- epsilon" in told


def test_model_stock_takes_no_weights(read):
    recipe, _ = read(content("model_stock"))
    assert (recipe.method, recipe.params) == ("model_stock", {})
    (told,) = problems_of(read, content("model_stock", parameters={"filter_wise": True}))
    assert "filter_wise" in told


@pytest.mark.parametrize("method", sorted(COUNTERPARTS))
def test_the_method_takes_what_is_imported(tmp_path, method):
    row = COUNTERPARTS[method]
    path = tmp_path / "mix.yaml"
    parameters = {"density": 0.5, "normalize": method == "linear"}
    path.write_text(yaml.safe_dump(content(method, parameters=parameters)))
    imported = import_recipe(path)
    assert METHODS[row.method].bind(imported.params, list(imported.adapters))


def test_a_method_this_version_lacks_is_said(tmp_path, monkeypatch):
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump(content()))
    monkeypatch.setattr(writing, "METHODS", {})
    with pytest.raises(RecipeError, match="'task_arithmetic' here, which this version lacks"):
        import_recipe(path)


def test_one_slice_of_whole_models(read):
    sources = [{**entry, "layer_range": [0, 32]} for entry in content()["models"]]
    values = content(slices=[{"sources": sources, "parameters": {"lambda": 0.3}}])
    del values["models"]
    recipe, imported = read(values)
    assert recipe.params == {"weights": {"math": 0.5, "code": 1.0}, "scale": 0.3}
    assert any("layers 0 to 31" in line for line in imported.warnings)


def test_weights_over_the_layers_are_straight_lines_between_points(read):
    models = [model("a", weight=[0.0, 1.0, 0.5]), model("b", weight=0.4)]
    sources = [{**entry, "layer_range": [0, 5]} for entry in models]
    values = content(slices=[{"sources": sources}], models=None)
    weights = read(values)[0].params["weights"]
    assert weights == {"a": [0.0, 0.5, 1.0, 0.75, 0.5], "b": 0.4}
    values["parameters"] = {"normalize": True}
    weights = read(values)[0].params["weights"]
    assert weights["a"] == pytest.approx([0.0, 5 / 9, 5 / 7, 0.75 / 1.15, 5 / 9])
    assert [a + b for a, b in zip(*weights.values(), strict=True)] == pytest.approx([1.0] * 5)


def test_nearer_settings_win(read):
    models = [model("a", weight=0.5), model("b")]
    recipe, _ = read(content(models=models, parameters={"weight": 0.25}))
    assert recipe.params["weights"] == {"a": 0.5, "b": 0.25}


def test_settings_that_say_one_number_in_many_ways(read):
    models = [
        model("a", weight=[0.5, 0.5, 0.5]),
        model("b", weight=[{"filter": "mlp", "value": 2}, {"value": 2}]),
    ]
    assert read(content(models=models))[0].params["weights"] == {"a": 0.5, "b": 2.0}


def test_the_table_form_of_a_model(read):
    parts = {"model": {"path": BASE, "revision": None}, "lora": {"path": "x/y", "revision": "v2"}}
    models = [{"model": parts, "parameters": {"weight": 1}}]
    recipe, imported = read(content(models=models))
    assert [ref.path for ref in recipe.adapters] == ["x/y"]
    assert any("revision v2 of x/y" in line for line in imported.warnings)


def test_what_changes_nothing_is_left_out_with_a_word(read):
    values = content(parameters={"int8_mask": 1.0, "t": [0, 1]}, tokenizer_source="base")
    warnings = "\n".join(read(values)[1].warnings)
    assert all(word in warnings for word in ("int8_mask", "parameters.t:", "tokenizer_source"))


def test_adapters_of_equal_names_are_told_apart(read):
    models = [model("one/lora", weight=1), model("two/lora", weight=2), model("a b!", weight=3)]
    assert read(content(models=models))[0].params["weights"] == {
        "lora": 1.0,
        "lora-2": 2.0,
        "a-b": 3.0,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge_method": "slerp"}, "'slerp' has no counterpart here. Try 'linear'."),
        ({"merge_method": "breadcrumbs_ties"}, "Try 'breadcrumbs'"),
        ({"merge_method": "tie"}, "Did you mean 'ties'?"),
        ({"merge_method": None}, "merge_method"),
        ({"merge_method": ["ties"]}, "merge_method"),
        ({"models": None}, "models: give either"),
        ({"models": []}, "at least one entry"),
        ({"models": ["x"]}, "a table is expected"),
        ({"models": [model()]}, "no adapter among them"),
        ({"models": [{"model": "other/full", "parameters": {"weight": 1}}]}, "a full model"),
        ({"models": [{"model": "a+b+c"}]}, "base+adapter"),
        ({"models": [{"model": 7}]}, "base+adapter"),
        ({"models": [{**model("a", weight=1), "weight": 1}]}, "models[0].weight"),
        ({"models": [model("a", weight=1), model("a", weight=2)]}, "named twice"),
        ({"models": [model("a@v1", weight=1), model("a@v2", weight=2)]}, "named twice"),
        ({"models": [{"model": "+a"}]}, "base+adapter"),
        ({"models": [model("a")]}, "no weight"),
        ({"models": [model("a", weight="much")]}, "a number is expected"),
        ({"models": [model("a", weight=float("nan"))]}, "a number is expected"),
        ({"models": [model("a", weight=[0.1, 0.9])]}, "does not say how many"),
        (
            {"models": [model("a", weight=[{"filter": "mlp", "value": 2}, {"value": 1}])]},
            "differs between layers",
        ),
        ({"slices": [{"sources": []}]}, "give either models or slices"),
        ({"modules": {"text": {}}, "models": None}, "modules: parts of a model"),
        ({"base_model": "other/base"}, "2 different bases"),
        ({"base_model": f"{BASE}+x"}, "plain base"),
        ({"tokenizer_source": "union"}, "tokenizer_source"),
        ({"tokenizer": {"source": "union"}}, "tokenizer"),
        ({"chat_template": "auto"}, "chat_template"),
        ({"dtype": "int4"}, "dtype"),
        ({"surprise": 1}, "surprise"),
        ({"parameters": {"rescale": True}}, "rescale"),
    ],
)
def test_what_cannot_be_carried_over(read, changes, words):
    told = problems_of(read, content(**changes))
    assert any(words in line for line in told), told


def test_a_full_model_beside_adapters(read):
    models = [*content()["models"], {"model": "other/full", "parameters": {"weight": 1}}]
    (told,) = problems_of(read, content(models=models))
    assert "models[2]: a full model" in told


@pytest.mark.parametrize(
    "slices",
    [
        [{"sources": [{**model("a", weight=1), "layer_range": [4, 8]}]}],
        [{"sources": [model("a", weight=1)]}],
        [{"sources": [{**model("a", weight=1), "layer_range": [0, 8]}]}] * 2,
        [{"sources": []}],
        [{}],
        "all",
    ],
)
def test_parts_of_models(read, slices):
    values = content(slices=slices)
    del values["models"]
    assert all("slices" in line for line in problems_of(read, values))


def test_densities_must_be_one(read):
    models = [model("a", weight=1, density=0.2), model("b", weight=1, density=0.3)]
    (told,) = problems_of(read, content("ties", models=models))
    assert "density: 0.2, 0.3 but one number" in told


def test_every_problem_is_told_at_once(read):
    values = content("slerp", dtype="int4", chat_template="x", models=[model("a", weight="w")])
    told = problems_of(read, values)
    assert [line.split(": ")[1] for line in told] == ["merge_method", "chat_template", "dtype"]


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: [*a, *a]\n",
        "a: " + "[" * 5000 + "]" * 5000,
        "!!python/object/apply:os.system ['touch pwned']",
        "merge_method: !!python/name:os.system\n",
        "- a\n- b\n",
        "a: 1\na: 2\n",
        "a: 1\n---\nb: 2\n",
        "\t:",
        "merge_method: ties\nmodels: 2020-99-99\n",
    ],
)
def test_hostile_yaml(read, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert problems_of(read, text)
    assert not (tmp_path / "pwned").exists()


def test_many_adapters_of_one_name_take_no_time():
    started = time.process_time()
    names = writing.adapter_names(["lora", *(f"{k}/lora" for k in range(20_000)), "lora-3"])
    assert (names[0], names[1], names[-2:]) == ("lora", "lora-2", ["lora-20001", "lora-3-2"])
    assert len(set(names)) == len(names)
    assert time.process_time() - started < 10


def test_files_too_large_or_absent(tmp_path):
    path = tmp_path / "huge.yaml"
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(RecipeError, match="over 1000000 bytes"):
        import_recipe(path)
    for absent in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(RecipeError, match="no such file"):
            import_recipe(absent)
    path.with_name("odd.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        import_recipe(path.with_name("odd.txt"))


def test_paths_that_would_rewrite_a_terminal_or_the_recipe(tmp_path):
    path = tmp_path / "mix.yaml"
    evil = "lora/\u202eabc\x1b[31m"
    values = content(models=[model(evil, weight=1.0), model("x\ny: z", weight=1.0)])
    path.write_text(yaml.safe_dump(values))
    text = recipe_text(import_recipe(path))
    assert "\u202e" not in text
    assert "\x1b" not in text
    (tmp_path / "out.yaml").write_text(text)
    recipe = load_recipe(MergeRecipe, tmp_path / "out.yaml")
    assert [ref.path for ref in recipe.adapters] == [evil, "x\ny: z"]


def test_a_path_that_is_an_interpolation(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump(content(models=[model("${oc.env:HOME}", weight=1)])))
    with pytest.raises(RecipeError, match="may not hold"):
        import_recipe(path)


def mergekits(method, deltas, weights, density=1.0, gamma=0.01, normalize=False, scale=1.0):
    """Return what mergekit's documentation says a method makes of dense deltas."""
    w = torch.tensor(weights)[:, None, None]
    if method == "model_stock":
        flat = deltas.flatten(1)
        cosines = (flat @ flat.T) / flat.norm(dim=1) / flat.norm(dim=1)[:, None]
        n = len(deltas)
        cosine = float(cosines.sum() - n) / (n * (n - 1))
        return n * cosine / (1 + (n - 1) * cosine) * deltas.mean(0)
    kept = torch.zeros_like(deltas)
    for delta, out in zip(deltas, kept, strict=True):
        order = delta.abs().flatten().argsort(descending=True)
        top = int(gamma * order.numel()) if method == "breadcrumbs" else 0
        some = order[top : top + int(density * order.numel())]
        out.view(-1)[some] = delta.reshape(-1)[some]
    weighted = w * kept
    mask = torch.ones_like(kept)
    if method in ("ties", "dare_ties", "della"):
        mask = (weighted.sign() == torch.where(weighted.sum(0) >= 0, 1.0, -1.0)).float()
    total, share = (weighted * mask).sum(0), (w * mask).sum(0)
    return scale * (total / torch.where(share == 0, 1.0, share) if normalize else total)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"normalize": True}),
        ("task_arithmetic", {"lambda": 0.7}),
        ("task_arithmetic", {"normalize": True}),
        ("ties", {"density": 0.4, "normalize": True}),
        ("ties", {"density": 0.4, "normalize": False, "lambda": 2.0}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
        ("model_stock", {}),
        # Masks are drawn differently, so only where everything is kept can numbers agree.
        ("dare_linear", {"density": 1.0, "lambda": 0.5}),
        ("dare_ties", {"density": 1.0}),
        ("della", {"density": 1.0, "normalize": False}),
    ],
)
def test_the_imported_recipe_gives_mergekits_numbers(make_adapter, tmp_path, method, parameters):
    weights = {"a": 0.5, "b": 1.5, "c": -0.25}
    # The same seed twice: angles that are no noise about zero, for the one method of angles.
    adapters = [make_adapter(name, rank=2, seed=k // 2) for k, name in enumerate(weights)]
    modules = {m: [x.modules[m].delta() for x in adapters] for m in adapters[0].modules}
    path = tmp_path / "mix.yaml"
    models = [model(name, weight=weight) for name, weight in weights.items()]
    path.write_text(yaml.safe_dump(content(method, models=models, parameters=parameters)))
    imported = import_recipe(path)
    found = merge(adapters, imported.method, params=imported.params, output_rank="exact").adapter
    given = {"scale" if n == "lambda" else n: value for n, value in parameters.items()}
    for module, deltas in modules.items():
        expected = mergekits(method, torch.stack(deltas), list(weights.values()), **given)
        torch.testing.assert_close(found.modules[module].delta(), expected, rtol=1e-4, atol=1e-5)
