"""Learned rows of a results table: each set's experts, each row's own recipe, kept by content."""

from pathlib import Path

from icm_ray.config import LearnSpec, MethodRow
from icm_ray.fusion.in_context import Context
from icm_ray.learning.recipes import needs_grams, spec_of
from icm_ray.learning.tasks import learner_data
from icm_ray.workflows.learn import LearnRequest, learn_to_folder
from icm_ray.workflows.pipeline.offer import affords
from icm_ray.workflows.pipeline.table import SetResults, Table


def learn_rows(table: Table) -> None:
    """Learn what each learned row merges with, from each set's experts."""
    for one in table.sets:
        for row in table.rows_that_need("learned_merge"):
            if not affords(table, row):
                continue
            one.learned[row.name] = learn_row(table, one, row, spec_of(row.method, row.learn))


def learn_row(
    table: Table, one: SetResults, row: MethodRow, spec: LearnSpec, context: Context | None = None
) -> Path:
    """Return the folder of what a row learned from a set's experts and inputs.

    Args:
        table: The table.
        one: The experts.
        row: The row.
        spec: Its learning recipe.
        context: The Fusion-VAE whose latent moves, if one does.
    """
    files = one.files(row.tasks)
    tasks = [file.name for file in files]
    data = learner_data(table.inputs(row), tasks, [spec.objective], one.experts)
    grams = one.grams_for(row) if needs_grams(spec) else None
    request = LearnRequest(row.method, spec, files, data, context, grams)
    folder = table.root / "learned" / one.label / row.name
    return learn_to_folder(table.session, request, folder, f"{row.name} {one.label}")
