"""What a merge recipe must name for its method. No torch here: what is missing is told at once."""

from icm_ray.config import MergeRecipe
from icm_ray.errors import RecipeError
from icm_ray.methods import find_method


def check_sources(recipe: MergeRecipe, *, can_gather: bool) -> None:
    """Refuse an unknown method, wrong parameters, and evidence that is missing or out of place.

    Raises:
        RecipeError: every such problem.
    """
    row = find_method(recipe.method)
    needs, problems = row.needs, []
    try:
        row.bind(recipe.params, [ref.name for ref in recipe.adapters])
    except RecipeError as error:
        problems += error.problems
    if recipe.learn and needs != "learned_merge":
        problems.append(f"learn: method {recipe.method!r} learns nothing. Leave it out.")
    if recipe.data is not None and needs is None:
        problems.append(f"data: method {recipe.method!r} gathers none. Leave it out.")
    elif recipe.data is not None and needs == "fusion_model":
        problems.append("data: a Fusion-VAE is trained by jobs.train_fusion. Name it as evidence.")
    elif recipe.data is not None and recipe.evidence is not None and needs != "gram_statistics":
        problems.append("data, evidence: both named but one is expected. Leave one out.")
    elif recipe.data is not None and not recipe.base:
        problems.append("base: missing but data are run through it. Name the adapters' base.")
    elif recipe.data is not None and not can_gather:
        problems.append(
            "data: gathered by running the base on Ray, which this command does not. Run "
            "python -m jobs.merge with the same recipe, or name evidence that is ready."
        )
    elif needs and recipe.data is None and recipe.evidence is None:
        advice = "Name base and data, or a folder written by jobs.evidence."
        if needs == "fusion_model":
            advice = "Name a folder written by jobs.train_fusion."
        problems.append(f"evidence: missing but method {recipe.method!r} needs {needs}. {advice}")
    if problems:
        raise RecipeError(problems)
