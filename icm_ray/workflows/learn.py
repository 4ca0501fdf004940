"""`jobs.learn`: from adapters and unlabelled inputs to a folder that `merge` reads."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from icm_ray.adapters import AdapterFile, open_adapter, open_all
from icm_ray.base_model.loading import load_reader
from icm_ray.checkpoint import scratch_folder
from icm_ray.config import LearnRecipe, LearnSpec, Resources
from icm_ray.distributed.evidence import grams_on_ray
from icm_ray.distributed.learning import LearnOrder, learn_on_ray
from icm_ray.distributed.session import Session, opened
from icm_ray.errors import RecipeError
from icm_ray.evidence.learned import LearnedMerge, load_learned, save_learned
from icm_ray.evidence.tensors import read_evidence
from icm_ray.files import (
    RUN_FILE,
    cost_of,
    is_done,
    refuse_foreign,
    sha256_of,
    whole_folder,
    write_json,
)
from icm_ray.fusion.in_context import Context, context_specs
from icm_ray.fusion.latent import check_beneath
from icm_ray.fusion.store import load_fusion
from icm_ray.learning.learner import Run
from icm_ray.learning.objectives import refuse_unreached
from icm_ray.learning.recipes import Plan, grams_in, needs_grams, plan_of, spec_of
from icm_ray.learning.shares import shares_of
from icm_ray.learning.tasks import LearnerData, experts_for, learner_data
from icm_ray.merging.estimate import warn, warnings_of
from icm_ray.methods import METHODS, find_method
from icm_ray.report import LearnedRow, learned_page
from icm_ray.workflows.prepared import data_of, heads_in, prepared_base, preparing

VERSION = 3


@dataclass(frozen=True)
class LearnRequest:
    """One merge to learn.

    Attributes:
        method: The method that learns, under whose name the result is merged.
        spec: The learning recipe.
        files: All adapters of the merge.
        data: Inputs of each task, with heads and labels where the objective reads them.
        context: The Fusion-VAE whose latent moves; None: what the recipe's `parameters` say.
        grams: Folder of Gram statistics, where the recipe starts from RegMean.
    """

    method: str
    spec: LearnSpec
    files: Sequence[AdapterFile]
    data: LearnerData
    context: Context | None = None
    grams: Path | None = None

    def key(self, session: Session) -> str:
        """Return what identifies what is learned."""
        residual = self.spec.start.residual
        beneath = None
        if residual is not None and residual not in METHODS:  # a saved merge beneath
            beneath = open_adapter(Path(residual)).fingerprint
        content = {
            "version": VERSION,
            "method": self.method,
            "spec": self.spec.model_dump(),
            "adapters": {file.name: file.fingerprint for file in self.files},
            "data": self.data.key,
            "base": session.key,
            "seed": session.seed,
            "threads": session.resources.threads,
            "grams": read_evidence(self.grams).identity if self.grams else None,
            "beneath": beneath,
            "context": self.context.identity if self.context else None,
        }
        return sha256_of(content)


def run(recipe: LearnRecipe, target: Path) -> dict[str, Any]:
    """Learn a merge from unlabelled inputs, one actor a task; `merge` reads what it writes."""
    refuse_foreign(target)
    request = request_of(recipe)
    files = request.files
    warn(warnings_of(files))
    suite, heads = data_of(recipe.data), heads_in(request.data)
    base = prepared_base(recipe, suite, heads, [recipe.data.split])
    with opened(recipe.resources, base, recipe.seed, preparing(recipe)) as session:
        learn_with_grams(session, request, target, recipe.method)
    report = load_learned(target).report
    losses = _summary(report)
    page = _write_page(recipe.method, target, files)
    return {"outputs": {"evidence": str(target), "report": str(page)}, "losses": losses}


def request_of(recipe: LearnRecipe) -> LearnRequest:
    """Return what a recipe wants learned, its adapters opened, checked before any spend."""
    refs = [ref.pair for ref in recipe.adapters]
    files = open_all(refs, recipe.modules_to_save, base=recipe.base, run_by="jobs.learn")
    if (find_method(recipe.method).needs == "fusion_model") != bool(recipe.fusion):
        raise RecipeError(
            f"fusion: {recipe.fusion!r} with method {recipe.method!r}. Name the folder of "
            "jobs.train_fusion for icm_fusion, and for no other method."
        )
    context = None
    if recipe.fusion:
        spec, direct = context_specs(recipe.in_context, recipe.learn)
        context = Context(Path(recipe.fusion), direct)
        model = load_fusion(context.fusion)  # read again where it is used
        model.check_adapters({file.name: file.fingerprint for file in files})
        if spec.start.residual:
            check_beneath(model.layout.gauge)
    else:
        spec = spec_of(recipe.method, recipe.learn)
    refuse_form(spec, recipe.resources)
    refuse_unreached(spec.objective, {module for file in files for module in file.shapes})
    tasks = [file.name for file in files]
    experts = experts_for(spec.objective, recipe.heads, recipe.data, refs)
    data = learner_data(recipe.data, tasks, [spec.objective], experts)
    return LearnRequest(recipe.method, spec, files, data, context)


def refuse_form(spec: LearnSpec, resources: Resources) -> None:
    """Raise RecipeError if Gram statistics are to have a form, but learning reads none."""
    if resources.grams != "full" and not needs_grams(spec):
        raise RecipeError(
            f"resources.grams: {resources.grams} but learning starts from none. Leave it out, or "
            "set learn.start.residual: regmean."
        )


def learn_with_grams(session: Session, request: LearnRequest, folder: Path, label: str) -> Path:
    """Learn into `folder`, after gathering Gram statistics beside it if the start needs them."""
    if needs_grams(request.spec):
        grams = folder.with_name(f"{folder.name}.grams")
        with session.pool(len(request.files)) as pool:
            grams_on_ray(pool, request.files, request.data.inputs, grams)
        request = replace(request, grams=grams)
    return learn_to_folder(session, request, folder, label)


def learn_to_folder(session: Session, request: LearnRequest, folder: Path, label: str) -> Path:
    """Learn, or find what was learned in `folder`; return the folder.

    Args:
        session: The base, and what each actor gets.
        request: What is learned.
        folder: Where the evidence goes.
        label: Shown by the progress bar.
    """
    key, context = request.key(session), request.context
    if is_done(folder, key):
        return folder
    adapters = [file.load() for file in request.files]
    batch = request.spec.optimisation.batch
    tasks = request.data.batched(adapters, load_reader(session.base), batch)
    known = read_evidence(request.grams) if request.grams else None
    grams = grams_in(known, [file.name for file in request.files]) if known else None
    plan = plan_of(request.spec, adapters, grams)
    scratch = scratch_folder(folder, "learning", key)
    run = Run(session.seed, session.resources.threads, scratch, key)
    seconds = [cost_of(context.fusion)] if context else []

    def stage(plan: Plan, name: str = "") -> LearnedMerge:
        order = LearnOrder(plan, tasks, run.of_stage(name))
        learned, cost = learn_on_ray(session, order, f"{label} {name}".strip())
        seconds.append(cost)
        return replace(learned, origin=plan.spec.model_dump())

    learned = context.learn(stage, plan, adapters) if context else stage(plan)
    counts = {task: len(inputs) for task, (inputs, _) in request.data.inputs.items()}
    learned = replace(learned, method=request.method)
    save_learned(learned, folder, {"key": key, "inputs": counts})
    write_json(folder / RUN_FILE, {"cpu_seconds": sum(seconds)})
    shutil.rmtree(scratch)
    return folder


def _summary(report: Any) -> dict[str, dict[str, float]]:
    """Say what happened; return each task's mean loss at start and end."""
    for task, line in report["warnings"].items():
        warn([f"{task}: {line}"])
    first = report.get("latent", report)["losses"]  # of two stages
    losses = {
        task: {"start": mean(first[task]["start"]), "end": mean(own["end"])}
        for task, own in report["losses"].items()
    }
    for task, loss in losses.items():
        print(f"{task}: loss {loss['start']:.4f} at the start, {loss['end']:.4f} at the end")
    if report["unmoved"]:
        print(f"no path to a target, left at the start: {', '.join(report['unmoved'])}")
    return losses


def _write_page(method: str, target: Path, files: Sequence[AdapterFile]) -> Path:
    """Write the page about what was learned into a folder beside it; return the page."""
    place = target.with_name(f"{target.name}.report")
    with whole_folder(place) as folder:
        page = learned_page(learned_row(method, target, files))
        (folder / "index.html").write_text(page, encoding="utf-8")
    return place / "index.html"


def learned_row(name: str, folder: Path, files: Sequence[AdapterFile]) -> LearnedRow:
    """Return what one learned merge shows of itself; of two stages, one loss after the other."""
    learned = load_learned(folder)
    latent = learned.report.get("latent", {}).get("history", {})
    history = learned.report["history"]
    shares, core = shares_of(learned, [file.load() for file in files])
    return LearnedRow(
        method=name,
        history={task: [*latent.get(task, ()), *losses] for task, losses in history.items()},
        shares=shares,
        core=core,
        unmoved=learned.report["unmoved"],
        warnings=learned.report["warnings"],
    )
