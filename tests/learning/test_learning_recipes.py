"""From a recipe's words to the learner's objects: every word does what it says."""

import pytest
import torch
from learning_samples import merged_factors

import icm_ray
from icm_ray.base_model.loading import load_base
from icm_ray.config import LearnSpec, ObjectiveSpec, OptimisationSpec, ParametersSpec, StartSpec
from icm_ray.errors import InputError, RecipeError
from icm_ray.learning.descent import Descent
from icm_ray.learning.objectives import objective_of, reads_heads
from icm_ray.learning.objectives.distillation import Distillation
from icm_ray.learning.objectives.entropy import HeadEntropy
from icm_ray.learning.objectives.module_inputs import Tokens
from icm_ray.learning.objectives.null_space_ratio import NullSpaceRatio
from icm_ray.learning.objectives.row_space_match import RowSpaceMatch
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.objectives.task_vector_match import TaskVectorMatch
from icm_ray.learning.parameters import Coefficients, CoreMatrices
from icm_ray.learning.recipes import needs_grams, plan_of, spec_of
from icm_ray.learning.targets import Targets
from icm_ray.learning.terms import regmean_terms, summed, tsv_terms

PLAIN = LearnSpec(objective=ObjectiveSpec(kind="null_space_ratio"))


def plan(adapters, grams=None, **parts):
    return plan_of(PLAIN.model_copy(update=parts), adapters, grams)


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for module, factors in expected.items():
        torch.testing.assert_close(found[module].delta(), factors.delta(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def grams(terms):
    draw = torch.Generator().manual_seed(0)
    inputs = {
        (m, t): torch.randn(40, 16, generator=draw) for m in terms.modules for t in terms.tasks
    }
    return lambda m: {f"gram.{t}": inputs[m, t].T @ inputs[m, t] / 40 for t in terms.tasks}


def test_parameters_move_as_the_plan_s_recipe_says(adapters, tiny_llama) -> None:
    how = OptimisationSpec(steps=7, lr=0.2, optimizer="adam", weight_decay=0.3)
    learning = plan(adapters, optimisation=how).learning(load_base(tiny_llama))
    assert learning.optimisation == how
    (group,) = Descent(learning.parameters.tensors(), how).optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.3)


def test_coefficients_are_shared_grouped_and_linked_as_it_says(adapters) -> None:
    how = ParametersSpec(sharing="block", groups=2, link="sigmoid")
    made = plan(adapters, parameters=how, start=StartSpec(value=0.3)).parameters()
    assert isinstance(made, Coefficients)
    assert {name: leaf.shape for name, leaf in made.tensors().items()} == {
        f"encoder.layer.{block}": (3, 2) for block in (0, 1)
    }
    for leaf in made.tensors().values():
        torch.testing.assert_close(leaf.detach().sigmoid(), torch.full((3, 2), 0.3))
    plain = plan(adapters).parameters()
    assert len(plain.tensors()) == len(adapters[0].modules)
    assert all(leaf.tolist() == [[pytest.approx(1 / 3)]] * 3 for leaf in plain.tensors().values())


@pytest.mark.parametrize("extend", [False, True])
def test_cores_span_a_residual_if_it_says_so(adapters, terms, grams, extend) -> None:
    how = ParametersSpec(kind="cores", extend=extend)
    start = StartSpec(value=0.0, residual="regmean")
    made = plan(adapters, grams, parameters=how, start=start).parameters()
    assert isinstance(made, CoreMatrices)
    assert_equal(merged_factors(made), summed(regmean_terms(terms, grams)))
    module = sorted(terms.modules)[0]
    # Ranks 2, 3 and 2, and as many more directions of the rows that RegMean bends.
    assert made.frames[module].right.shape[0] == (14 if extend else 7)


@pytest.mark.parametrize("basis", ["own", "tsv", "regmean"])
def test_terms_are_those_of_the_basis(adapters, terms, grams, basis) -> None:
    start = StartSpec(value=0.4, basis=basis, rho=0.5)
    found = merged_factors(plan(adapters, grams, start=start).parameters())
    bases = {"own": terms, "tsv": tsv_terms(terms), "regmean": regmean_terms(terms, grams, rho=0.5)}
    assert_equal(found, summed(bases[basis], 0.4))


def test_regmean_lies_beneath_at_its_scale(adapters, terms, grams) -> None:
    start = StartSpec(value=0.0, residual="regmean", residual_scale=0.7, rho=0.5)
    found = merged_factors(plan(adapters, grams, start=start).parameters())
    assert_equal(found, summed(regmean_terms(terms, grams, rho=0.5), 0.7))


def test_a_merged_adapter_lies_beneath_at_its_scale(adapters, make_adapter, tmp_path) -> None:
    saved = icm_ray.merge(adapters, "soup").adapter
    icm_ray.save_adapter(saved, tmp_path / "soup")
    start = StartSpec(value=0.0, residual=str(tmp_path / "soup"), residual_scale=3.0)
    found = merged_factors(plan(adapters, start=start).parameters())
    assert_equal(found, icm_ray.merge(adapters, "task_arithmetic").adapter.modules)
    named = StartSpec(value=0.0, residual="soup", residual_scale=3.0)
    assert_equal(merged_factors(plan(adapters, start=named).parameters()), found)
    with pytest.raises(RecipeError, match="'esm' needs gram_statistics"):
        plan(adapters, start=StartSpec(residual="esm"))
    icm_ray.save_adapter(make_adapter("other"), tmp_path / "other")
    with pytest.raises(InputError, match="shapes differ from the adapters'"):
        plan(adapters, start=StartSpec(residual=str(tmp_path / "other")))


def test_grams_are_asked_for_where_they_are_needed(adapters) -> None:
    for start in (StartSpec(basis="regmean"), StartSpec(residual="regmean")):
        assert needs_grams(PLAIN.model_copy(update={"start": start}))
        with pytest.raises(RecipeError, match="no Gram statistics were gathered"):
            plan(adapters, start=start)
    assert not needs_grams(PLAIN)


WHERE = {"names": ["value"], "blocks": [1], "share": 0.5, "padding": True, "skip_first": False}
TARGETS, TOKENS = Targets(("value",), (1,), 0.5), Tokens(padding=True, skip_first=False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"kind": "null_space_ratio", **WHERE}, NullSpaceRatio(TARGETS, TOKENS)),
        ({"kind": "row_space_match", **WHERE}, RowSpaceMatch(TARGETS, TOKENS)),
        (
            {"kind": "null_space_ratio", "skip_first": True},
            NullSpaceRatio(tokens=Tokens(False, True)),
        ),
        ({"kind": "task_vector_match"}, TaskVectorMatch()),
        ({"kind": "task_vector_match", "heads": True}, TaskVectorMatch(heads=True)),
        ({"kind": "entropy"}, HeadEntropy()),
        ({"kind": "distillation"}, Distillation()),
        ({"kind": "distillation", "temperature": 2.0}, Distillation(temperature=2.0)),
        ({"kind": "distillation", "unit": "larger"}, Distillation(scaling="larger")),
        ({"kind": "supervised"}, Supervised()),
    ],
)
def test_what_is_minimised_is_as_it_says(words, expected) -> None:
    assert objective_of(ObjectiveSpec(**words), None) == expected


def test_a_language_model_s_objectives_read_its_own_head(tiny_llama) -> None:
    base = load_base(tiny_llama)
    spec = ObjectiveSpec(kind="token_entropy", max_new_tokens=5, reduction="sum")
    entropy = objective_of(spec, base)
    assert (entropy.max_new_tokens, entropy.reduction) == (5, "sum")
    ends = {
        objective_of(ObjectiveSpec(kind=k), base).end for k in ("token_entropy", "distillation")
    }
    assert ends == {base.tokenizer.eos_token_id}
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for kind in ("token_entropy", "distillation", "supervised"):
        readout = objective_of(ObjectiveSpec(kind=kind), base).readout
        torch.testing.assert_close(readout(states), base.whole.lm_head(states))


@pytest.mark.parametrize(
    ("method", "changes", "reads"),
    [
        ("nsc", {}, False),
        ("task_vector_match", {}, False),
        ("task_vector_match", {"objective": {"heads": True}}, True),
        ("adamerging", {}, True),
        ("distillation", {}, True),
        ("atlas", {}, True),
    ],
)
def test_heads_are_read_where_the_objective_looks_through_them(method, changes, reads) -> None:
    assert reads_heads(spec_of(method, changes).objective) is reads
