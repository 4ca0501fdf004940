"""How experts went over their training: ratio, loss and score at steps that were kept.

ratios/<set>-training/  the mean ratio at each step, by task
"""

from dataclasses import replace

from icm_ray.distributed.actors import AdapterSource, CheckpointSource
from icm_ray.distributed.evidence import EVIDENCE_BATCH
from icm_ray.distributed.scores import ScoreItem, score_on_ray
from icm_ray.distributed.session import Pool
from icm_ray.evaluation.experts import TRAJECTORIES
from icm_ray.evaluation.scoring import task_data
from icm_ray.files import is_done, read_json, sha256_of, whole_folder, write_json
from icm_ray.finetuning.trajectory import evenly_spaced, read_trajectory
from icm_ray.report.data import TrainingCurve
from icm_ray.workflows.pipeline.table import SetResults, Table

VERSION = 1
MEANS = "means.json"
CHECKPOINTS, INPUTS = 8, 64


def training_curves(table: Table, one: SetResults, pool: Pool) -> dict[str, TrainingCurve]:
    """Return a curve for each task whose expert was trained here, where something was learned.

    Ratios and scores are those of the LoRA at a step, ratios as a mean over modules on calibration
    inputs, scores on as many validation examples through the finished head, or all there are.
    """
    place = (table.root / TRAJECTORIES / one.label).absolute()
    files = [f for f in one.proven() if one.learned and (place / f.name).is_dir()]
    if not files:
        return {}
    kept = {}
    for file in files:
        rows = read_trajectory(place / file.name)[0].select(["step", "loss"]).to_pylist()
        kept[file.name] = {row["step"]: row["loss"] for row in evenly_spaced(rows, CHECKPOINTS)}
    sources = {
        (file.name, step): CheckpointSource(AdapterSource(file), place / file.name, step)
        for file in files
        for step in kept[file.name]
    }
    ratios = _ratios(table, one, pool, sources)
    whole = task_data(table.suite, one.experts, "validation", table.recipe.sizes.validation)
    data = {t: replace(item, examples=item.examples.first(INPUTS)) for t, item in whole.items()}
    items = [ScoreItem(f"{t} {step}", source, (t,)) for (t, step), source in sources.items()]
    scores = score_on_ray(pool, items, data, table.root / "scores" / f"{one.label}-training")
    return {
        task: TrainingCurve(
            kind=table.suite.tasks[task].kind,
            steps=list(losses),
            ratios=[ratios[task][str(step)] for step in losses],
            losses=list(losses.values()),
            scores=[scores[f"{task} {step}"][task].score.value for step in losses],
        )
        for task, losses in kept.items()
    }


def _ratios(
    table: Table, one: SetResults, pool: Pool, sources: dict[tuple[str, int], CheckpointSource]
) -> dict[str, dict[str, float]]:
    """Return the mean ratio over modules by task and step."""
    limit = table.recipe.sizes.calibration
    inputs = {t: table.suite.load(t, "calibration", limit).first(INPUTS) for t, _ in sources}
    folder = table.root / "ratios" / f"{one.label}-training"
    content = {f"{t} {s}": [x.fingerprint, inputs[t].fingerprint] for (t, s), x in sources.items()}
    key = sha256_of([VERSION, content])
    if not is_done(folder, key):
        arguments = {
            (task, step): (
                source,
                inputs[task].inputs,
                table.suite.tasks[task].max_tokens,
                EVIDENCE_BATCH,
            )
            for (task, step), source in sources.items()
        }
        means: dict[str, dict[str, float]] = {task: {} for task in inputs}
        for (task, step), evidence in pool.map("evidence", arguments).items():
            ratios = evidence.expert_ratios.values()
            means[task][str(step)] = sum(ratios) / len(ratios)
        with whole_folder(folder, info={"key": key}) as target:
            write_json(target / MEANS, means)
    return read_json(folder / MEANS)
