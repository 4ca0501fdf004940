"""What a merge recipe must name for its method. No torch here: what is missing is told at once."""

from icm_ray.config import MergeRecipe
from icm_ray.errors import RecipeError
from icm_ray.kinds import CutMetric, EvidenceKind
from icm_ray.methods import find_method


def needs_of(method: str, metric: CutMetric | None) -> EvidenceKind | None:
    """Return the evidence that a merge cannot do without: its method, or the cut after it."""
    return find_method(method).needs or ("gram_statistics" if metric == "inputs" else None)


def refuse_blind(method: str, metric: CutMetric | None) -> None:
    """Raise RecipeError if a cut is to see inputs, and the method's evidence takes their place."""
    needs = find_method(method).needs
    if metric == "inputs" and needs in ("learned_merge", "fusion_model"):
        raise RecipeError(
            f"output.metric: inputs but method {method!r} has no Gram statistics beside its "
            f"{needs}. Leave it out: the cut then looks at the weights."
        )


def check(recipe: MergeRecipe) -> None:
    """Refuse what `jobs.merge`, which can gather evidence, could do nothing with."""
    check_sources(recipe, can_gather=True)


def check_sources(recipe: MergeRecipe, *, can_gather: bool) -> None:
    """Refuse an unknown method, wrong parameters, and evidence that is missing or out of place.

    Raises:
        RecipeError: every such problem.
    """
    row, problems = find_method(recipe.method), []
    needs = needs_of(recipe.method, recipe.output.metric)
    who = f"method {recipe.method!r}" if row.needs else "output.metric"
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
        problems.append(f"evidence: missing but {who} needs {needs}. {advice}")
    if problems:
        raise RecipeError(problems)
