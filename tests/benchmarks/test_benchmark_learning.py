"""Both sides of the steps give the same gradient at a tiny size; never their times."""

import pytest

from icm_ray.benchmarks.learning import compare_steps
from icm_ray.benchmarks.tables import as_markdown, as_tables
from icm_ray.config import BenchmarkRecipe
from icm_ray.errors import RecipeError

BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "initializer_range": 0.3,
}
LLAMA = {**BERT, "model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True}
CASES = {
    "ratio": (BERT, {"kind": "null_space_ratio", "names": "all"}, ["query", "value"]),
    "match": (BERT, {"kind": "row_space_match", "names": "all"}, ["query", "value"]),
    "entropy": (LLAMA, {"kind": "token_entropy", "max_new_tokens": 3}, ["q_proj", "v_proj"]),
}


def tiny(case, **changes):
    model, objective, targets = CASES[case]
    how = {"label": case, "model": model, "objective": objective, "targets": targets}
    how |= {"tokens": [6], "adapters": [2], "batch": 2, "repeats": 1, **changes}
    plain = {"methods": [], "rank": 3, "learning": [how], "output": "unused"}
    return BenchmarkRecipe.model_validate(plain)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_both_sides_step_in_the_same_direction(case, together):
    recipe = tiny(case, tokens=[6, 9], adapters=[2, 3], tasks_per_forward=together)
    rows = compare_steps(recipe.learning[0], recipe)
    assert [(row.tokens, row.adapters) for row in rows] == [(6, 2), (9, 2), (6, 3)]
    assert all(row.off < 1e-4 for row in rows)
    assert case in as_markdown(as_tables(recipe, [], None, [], rows))


def test_targets_that_do_not_exist_are_refused():
    recipe = tiny("ratio", targets=["q_proj"])
    with pytest.raises(RecipeError, match=r"learning.ratio.targets: no module"):
        compare_steps(recipe.learning[0], recipe)
