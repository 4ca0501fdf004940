"""Learned rows of a results table: each set's experts, each row's own recipe, kept by content."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from icm_ray.config import LearnSpec, MethodRow, PipelineRecipe
from icm_ray.distributed.shared_base import SharedBase
from icm_ray.fusion.in_context import Context
from icm_ray.learning.recipes import LABELLED, reads_heads, spec_of
from icm_ray.learning.tasks import load_inputs, readable_experts
from icm_ray.methods import find_method
from icm_ray.methods.table import LEARNED
from icm_ray.suites import Suite
from icm_ray.workflows.learn import learned_on_ray
from icm_ray.workflows.pipeline.results import SetResults
from icm_ray.workflows.pipeline.rows import inputs_spec


def learned_rows(recipe: PipelineRecipe) -> list[MethodRow]:
    """Return the rows whose methods learn."""
    return [row for row in recipe.methods if find_method(row.method).needs == LEARNED]


def learn_rows(
    recipe: PipelineRecipe,
    suite: Suite,
    sets: Sequence[SetResults],
    base: Path,
    shared: SharedBase,
    root: Path,
) -> list[SetResults]:
    """Return the sets with what each learned row learned from their experts."""
    rows = learned_rows(recipe)
    return [
        replace(
            one,
            learned={
                row.name: learn_row(
                    recipe, suite, one, row, spec_of(row.method, row.learn), base, shared, root
                )
                for row in rows
            },
        )
        for one in sets
    ]


def learn_row(
    recipe: PipelineRecipe,
    suite: Suite,
    one: SetResults,
    row: MethodRow,
    spec: LearnSpec,
    base: Path,
    shared: SharedBase,
    root: Path,
    context: Context | None = None,
) -> Path:
    """Return the folder of what a row learned from its experts and inputs.

    Args:
        recipe: The table.
        suite: Its tasks.
        one: The experts.
        row: The row.
        spec: Its learning recipe.
        base: Folder of the base, for its tokenizer.
        shared: The base in the object store.
        root: Output of the pipeline.
        context: The Fusion-VAE whose latent moves, if one does.
    """
    data, files = inputs_spec(recipe, row.inputs), one.files(row.tasks)
    names = [file.name for file in files]
    readable = readable_experts(
        suite,
        one.experts,
        names if reads_heads(spec) else (),
        data,
        labelled=spec.objective.kind in LABELLED,
    )

    def grams() -> Path:
        assert one.grams is not None, "gathered before, as the pipeline's rows_need_grams said"
        return one.grams

    return learned_on_ray(
        spec,
        files,
        load_inputs(data, names),
        readable,
        root / "learned" / one.label / row.name,
        base=base,
        shared=shared,
        resources=recipe.resources,
        seed=recipe.seed,
        grams=grams,
        label=f"{row.name} {one.label}",
        context=context,
    )
