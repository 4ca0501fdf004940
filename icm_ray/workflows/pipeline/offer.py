"""The methods of a recipe that names none: what the data allow, cheapest first, in the budget.

plan.json in the output holds what was planned, so that a second run tries the same.
"""

import time
from typing import Any

from icm_ray.config import MethodRow, PipelineRecipe
from icm_ray.distributed.session import Pool
from icm_ray.distributed.speed import Speed, speed_of
from icm_ray.evaluation.scoring import TaskData, task_data
from icm_ray.files import read_json, sha256_of, write_json
from icm_ray.fusion.serial import fusion_spec_of
from icm_ray.learning.recipes import spec_of
from icm_ray.learning.tasks import LearnerData, load_inputs
from icm_ray.merging.estimate import merge_seconds
from icm_ray.merging.order import MergeRequest
from icm_ray.methods import METHODS
from icm_ray.workflows.pipeline.table import Offer, SetResults, Table, variants
from icm_ray.workflows.pipeline.usual import NEVER, USUAL

PLAN = "plan.json"
PROBED = 16
"""Examples and inputs of a task that are timed."""
BACKWARD = 4.0
"""Forward passes that a learner's step is worth, its expert's own among them."""
INNER = 5.0
"""The same of an inner step of a Fusion-VAE."""
REFERENCES_COST = "base and experts"
"""What every table costs beside its rows."""
SECONDS_A_MERGE = 1.0
"""What writing and checking a folder takes beside the arithmetic."""
FUSION_BATCH = 16
VAE_STEP_SECONDS = 0.04


def offer_rows(table: Table, pool: Pool) -> None:
    """Plan which methods are tried, and say it in one line; a plan that is there holds."""
    recipe, one = table.recipe, table.sets[0]
    assert isinstance(recipe, PipelineRecipe)
    budget = recipe.budget.seconds(pool.size, recipe.resources) if recipe.budget else None
    content = [recipe.model_dump(exclude={"storage", "output"}), one.fingerprints()]
    table.offer.path, key = table.root / PLAN, sha256_of(content)
    kept = read_json(table.offer.path) if table.offer.path.is_file() else {}
    if kept.get("key") == key:
        plan = kept
    else:
        speed = speed_of(pool, one.proven(), few_of(table, one), few_inputs(table, one).inputs)
        plan = planned(table, one, speed, budget, pool.size)
        write_json(table.offer.path, {"key": key, "budget_seconds": budget, **plan})
    rows = {row.name: row for row in USUAL}
    table.offer.rows = [rows[name] for name, _ in plan["seconds"]]
    table.offer.seconds, table.offer.left_out = dict(plan["seconds"]), dict(plan["left_out"])
    table.offer.scoring = dict(plan["scoring"])
    if budget is not None:
        table.offer.ends = time.monotonic() + budget
    print(_line(table.offer, budget))


def few_of(table: Table, one: SetResults) -> dict[str, TaskData]:
    """Return the examples whose scoring is timed."""
    few = min(PROBED, *(table.suite.count(task, "validation") for task in one.scored))
    return task_data(table.suite, one.experts, "validation", few, one.unseen)


def few_inputs(table: Table, one: SetResults) -> LearnerData:
    """Return the unlabelled inputs whose forward pass is timed."""
    return LearnerData(load_inputs(table.inputs(), list(one.experts))).first(PROBED)


def allowed(table: Table, one: SetResults) -> tuple[list[MethodRow], dict[str, str]]:
    """Return the usual rows that the data allow, and why the others are not among them."""
    tasks = [table.suite.tasks[task] for task in one.experts]
    bare = [task.name for task in tasks if not task.labelled]
    blind, left_out = ", ".join(one.unproven), dict(NEVER)
    rows = []
    for row in USUAL:
        if METHODS[row.method].needs and blind:
            left_out[row.name] = f"no inputs of {blind}"
        elif row.method == "adamerging" and not any(t.kind == "classification" for t in tasks):
            left_out[row.name] = "no task with a head that classifies"
        elif row.method == "atlas" and bare:
            left_out[row.name] = f"no labels of {', '.join(bare)}"
        elif row.method == "icm_fusion" and len(one.experts) < 2:
            left_out[row.name] = "one adapter is not fused"
        else:
            rows.append(row)
    return rows, left_out


def planned(
    table: Table, one: SetResults, speed: Speed, budget: float | None, workers: int
) -> dict[str, Any]:
    """Return the seconds of each row that fits into the budget, and why others are left out.

    Rows are the recipe's own, or the usual ones where it names none.
    The cheapest row is tried in any case.
    """
    rows, left_out = (table.rows, {}) if table.rows else allowed(table, one)
    learning = {row.name: _learning(table, one, row, speed) / workers for row in rows}
    scoring = {row.name: _scoring(table, one, row, speed) / workers for row in rows}
    scoring[REFERENCES_COST] = references_seconds(table, one, speed) / workers
    seconds: dict[str, float] = {}
    spent = scoring[REFERENCES_COST]
    for name in sorted(learning, key=lambda name: learning[name] + scoring[name]):
        cost = learning[name] + scoring[name]
        if budget is not None and seconds and spent + cost > budget:
            left_out[name] = f"the budget: about {cost:.0f} s more"
            del scoring[name]
        else:
            seconds[name] = round(cost, 1)
            spent += cost
    return {
        "seconds": list(seconds.items()),
        "scoring": {name: round(cost, 1) for name, cost in scoring.items()},
        "left_out": left_out,
    }


def _learning(table: Table, one: SetResults, row: MethodRow, speed: Speed) -> float:
    """Return what gathering and learning for a row take of one worker."""
    tasks, needs = len(row.tasks or one.scored), METHODS[row.method].needs
    if needs == "fusion_model":
        spec = fusion_spec_of(row.fusion)
        inner = INNER * spec.meta_steps * FUSION_BATCH * tasks * speed.forward
        return inner + VAE_STEP_SECONDS * spec.vae_steps
    read = _examples(table, one, "calibration")
    inputs = read if row.inputs is None else row.inputs * tasks
    seconds = (inputs + read * row.again) * speed.forward if needs else 0.0
    if needs == "learned_merge":
        spec = spec_of(row.method, row.learn)
        how = spec.optimisation
        seconds += BACKWARD * how.steps * how.batch * tasks * speed.forward
        if spec.objective.kind == "distillation":  # of what the experts say, once
            seconds += inputs * speed.expert
    return seconds


def _scoring(table: Table, one: SetResults, row: MethodRow, speed: Speed) -> float:
    """Return what a row's merges and their scores take of one worker."""
    request = MergeRequest(row.method, row.params, None, row.rank, table.session.seed)
    merge = merge_seconds(one.files(row.tasks), request) + SECONDS_A_MERGE
    settings = len(list(variants(row)))
    validation, test = (_examples(table, one, split) for split in ("validation", "test"))
    validated = settings if row.grid or table.validates_all else 0
    if table.realigns:
        test = 2 * test + _examples(table, one, "calibration")
    return merge * settings + (validated * validation + 2 * test) * speed.merge


def references_seconds(table: Table, one: SetResults, speed: Speed) -> float:
    """Return what the base's and the experts' scores, and the task vectors, take of one worker."""
    scored = sum(_examples(table, one, split) for split in ("validation", "test"))
    vectors = 2 * _examples(table, one, "calibration") * speed.forward
    return scored * (speed.base + speed.expert) + vectors


def _examples(table: Table, one: SetResults, split: str) -> int:
    """Return how many examples of a split all tasks use together."""
    sizes = table.recipe.sizes
    asked = sizes.calibration if split == "calibration" else sizes.scored(split)
    return sum(asked or table.suite.count(task, split) for task in one.scored)


def affords(table: Table, row: MethodRow) -> bool:
    """Say whether there is time left to learn a row; if not, it is left out from now on.

    What is left must also do for merging and scoring every row that is kept.
    """
    offer = table.offer
    needed = offer.seconds.get(row.name, 0.0) - offer.scoring.get(row.name, 0.0)
    if time.monotonic() + needed + sum(offer.scoring.values()) <= offer.ends:
        return True
    offer.rows.remove(row)
    offer.left_out[row.name] = (
        f"the budget: learning it was planned with {needed:.0f} s and less was left"
    )
    assert offer.path is not None
    del offer.seconds[row.name], offer.scoring[row.name]
    kept = {"seconds": list(offer.seconds.items()), "scoring": offer.scoring}
    left = {**kept, "left_out": offer.left_out}
    write_json(offer.path, {**read_json(offer.path), **left})
    print(f"left out: {row.name}: {offer.left_out[row.name]}")
    return False


def _line(offer: Offer, budget: float | None) -> str:
    within = f"budget {budget:.0f} s" if budget is not None else "no budget"
    total = sum(offer.seconds.values()) + offer.scoring[REFERENCES_COST]
    shares = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in offer.seconds.items())
    out = [name for name, why in offer.left_out.items() if why.startswith("the budget")]
    rest = f"; left out for the budget: {', '.join(out)}" if out else ""
    return f"plan: {len(offer.rows)} methods, about {total:.0f} s ({within}): {shares}{rest}"
