"""Learned rows of a results table: each set's experts, each row's own recipe, kept by content."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from icm_ray.config import MethodRow, PipelineRecipe
from icm_ray.distributed.evidence import load_inputs
from icm_ray.distributed.fusion_rows import fusion_rows
from icm_ray.distributed.in_context import context_specs
from icm_ray.distributed.learn import LEARNED, learned_on_ray, readable_experts
from icm_ray.distributed.rows import SetResults, inputs_spec
from icm_ray.distributed.shared_base import SharedBase
from icm_ray.learning.recipes import LABELLED, needs_grams, reads_heads, spec_of
from icm_ray.methods.merge import find_method
from icm_ray.suites import Suite


def learned_rows(recipe: PipelineRecipe) -> list[MethodRow]:
    """Return the rows whose methods learn."""
    return [row for row in recipe.methods if find_method(row.method).needs == LEARNED]


def rows_need_grams(recipe: PipelineRecipe) -> bool:
    """Say whether a row merges with Gram statistics, or learns from a start that has them."""
    needs = {find_method(row.method).needs for row in recipe.methods}
    starts = [spec_of(row.method, row.learn) for row in learned_rows(recipe)]
    starts += [
        context_specs(row.in_context, row.learn)[0] for row in fusion_rows(recipe) if row.in_context
    ]
    return "GramStatistics" in needs or any(map(needs_grams, starts))


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
            learned={row.name: _learn(recipe, suite, one, row, base, shared, root) for row in rows},
        )
        for one in sets
    ]


def _learn(
    recipe: PipelineRecipe,
    suite: Suite,
    one: SetResults,
    row: MethodRow,
    base: Path,
    shared: SharedBase,
    root: Path,
) -> Path:
    spec = spec_of(row.method, row.learn)
    unlabelled = inputs_spec(recipe, row.inputs)
    files = one.files(row.tasks)
    readable = readable_experts(
        suite,
        one.experts,
        [file.name for file in files] if reads_heads(spec) else (),
        unlabelled,
        labelled=spec.objective.kind in LABELLED,
    )

    def grams() -> Path:
        assert one.grams is not None, "gathered before, as rows_need_grams said"
        return one.grams

    return learned_on_ray(
        spec,
        files,
        load_inputs(unlabelled, [file.name for file in files]),
        readable,
        root / "learned" / one.label / row.name,
        base=base,
        shared=shared,
        resources=recipe.resources,
        seed=recipe.seed,
        grams=grams,
        label=f"{row.name} {one.label}",
    )
