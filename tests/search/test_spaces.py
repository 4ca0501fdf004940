"""What a recipe may search, read from the methods' own signatures."""

from pathlib import Path

import optuna
import pytest

from icm_ray import METHODS
from icm_ray.config import SearchRecipe, SearchRow
from icm_ray.config.loading import load_recipe
from icm_ray.errors import RecipeError
from icm_ray.learning.recipes import LEARNERS
from icm_ray.search.defaults import default_space
from icm_ray.search.distributions import Dimension, parse
from icm_ray.search.spaces import space_of

CONFIGS = Path(__file__).parents[2] / "configs/search"
TASKS = ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform(0, 1)", Dimension("float", 0.0, 1.0)),
        ("loguniform(1e-3, 2)", Dimension("float", 1e-3, 2.0, log=True)),
        ("quniform(0, 1, 0.25)", Dimension("float", 0.0, 1.0, step=0.25)),
        ("int(1, 8)", Dimension("int", 1, 8)),
        ("logint(1, 64)", Dimension("int", 1, 64, log=True)),
        (
            " choice( ties, 0.5, 3, true, null ) ",
            Dimension("choice", choices=("ties", 0.5, 3, True, None)),
        ),
        ([8, 16], Dimension("choice", choices=(8, 16))),
    ],
)
def test_a_distribution_is_read(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "uniform(1, 0)",
        "uniform(0, inf)",
        "uniform(0)",
        "loguniform(0, 1)",
        "int(0.5, 2)",
        "quniform(0, 1, 2)",
        "normal(0, 1)",
        "choice()",
        "choice(a, a)",
        "uniform(__import__('os').getpid(), 1)",
        "choice(open('/etc/passwd'))",
        "0.5",
        [],
        [[1], [2]],
        3,
    ],
)
def test_anything_else_is_refused_and_never_run(text):
    with pytest.raises(RecipeError):
        parse(text)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_a_space_whose_ends_it_takes(method):
    # negate_add alone asks for the names of three adapters.
    tasks = ("target", "a", "b")
    space = space_of(SearchRow(method=method, space="default"), tasks, 1)
    assert space.dimensions
    assert set(default_space(method)) <= {"weights.*", *space.dimensions}
    assert method not in LEARNERS or "learn.optimisation.lr" in space.dimensions


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_parameter_can_be_searched_by_naming_it(method):
    for name, schema in METHODS[method].schema()["parameters"].items():
        default = schema["default"]
        values = schema.get("enum", [default])
        if name == "weights":
            search = {"weights.*": "uniform(0, 1)"}
        else:
            search = {f"params.{name}": list(values)}
        space = space_of(SearchRow(method=method, search=search), ("target", "a", "b"), 1)
        assert (
            space.setting(space.suggest(_middle(space))).params[name] is not None or default is None
        )


def _middle(space):
    return optuna.trial.FixedTrial({name: d.corners()[0] for name, d in space.dimensions.items()})


@pytest.mark.parametrize(
    ("search", "told"),
    [
        ({"params.densty": "uniform(0.1, 1)"}, "params.densty"),
        ({"params.density": "uniform(0.1, 2)"}, "params.density"),
        ({"params.preset": "choice(ties, unheard)"}, "params.preset"),
        ({"layers.g2": "uniform(0, 1)"}, "layers.g2"),
        ({"learn.optimisation.lr": "uniform(0.1, 1)"}, "learn"),
        ({"weights.d": "uniform(0, 1)"}, "weights"),
        ({"rank": "choice(0, 8)"}, "rank"),
        ({"colour": "choice(red, blue)"}, "colour"),
        ({}, "empty"),
    ],
)
def test_what_a_method_does_not_take_is_refused(search, told):
    with pytest.raises(RecipeError, match=told):
        space_of(SearchRow(method="ties", search=search), TASKS, 2)


def test_the_space_opens_once_the_method_is_chosen():
    search = {
        "method": "choice(svd, ties)",
        "ties.params.density": "uniform(0.1, 1)",
        "rank": [4, 8],
    }
    space = space_of(SearchRow(search=search), TASKS, 1)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [space.suggest(study.ask()) for _ in range(20)]
    for point in points:
        expected = {"method", "rank"} | (
            {"ties.params.density"} if point["method"] == "ties" else set()
        )
        assert set(point) == expected
        assert space.setting(point).rank == point["rank"]
    assert {point["method"] for point in points} == {"svd", "ties"}


def test_stars_stand_for_tasks_and_groups():
    search = {"layers.*.*": "uniform(0, 1)", "layers.*": [0.0, 1.0], "weights.*": "uniform(0, 1)"}
    space = space_of(SearchRow(method="tsv", search=search), TASKS, 2)
    assert len(space.dimensions) == 2 * 3 + 2 + 3
    point = {"layers.g0.a": 0.5, "layers.g1.a": 0.25, "layers.g1": 0.0, "weights.b": 2.0}
    weights = space.setting(point).params["weights"]
    assert weights == {"a": [0.5, 0.25], "b": [2.0, 0.0], "c": [1.0, 0.0]}


def test_what_a_recipe_sets_itself_is_not_searched_by_default():
    row = SearchRow(method="ties", params={"scale": 0.5}, space="default")
    space = space_of(row, TASKS, 1)
    assert list(space.dimensions) == ["params.density"]
    assert space.setting({"params.density": 0.3}).params == {"scale": 0.5, "density": 0.3}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_searches_are_sound(path):
    recipe = load_recipe(SearchRecipe, path)
    for row in recipe.rows or [recipe.row()]:
        space_of(
            row,
            ("depth", "keyword", "stress", "supersense", "syllables", "year"),
            recipe.layer_groups,
        )
