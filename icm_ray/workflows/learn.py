"""Evidence of learned methods: from adapters and inputs to a folder that `merge` reads."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from icm_ray.adapters import AdapterFile, open_adapter, open_all
from icm_ray.config import DataSpec, LearnRecipe, LearnSpec, MergeRecipe, Resources
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.learning import LearnOrder, learn_on_ray
from icm_ray.distributed.shared_base import SharedBase, share_base
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import find_experts
from icm_ray.evidence.learned import LearnedMerge, load_learned, save_learned
from icm_ray.evidence.tensors import read_given
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
from icm_ray.learning.recipes import (
    LABELLED,
    Grams,
    Plan,
    covered_by,
    needs_grams,
    plan_of,
    reads_heads,
    spec_of,
)
from icm_ray.learning.shares import shares_of
from icm_ray.learning.tasks import (
    EVIDENCE_BATCH,
    Inputs,
    Readable,
    heads_key,
    inputs_key,
    load_inputs,
    readable_experts,
    task_inputs,
)
from icm_ray.merging.estimate import warn, warnings_of
from icm_ray.methods import find_method
from icm_ray.methods.table import FUSES
from icm_ray.report import LearnedRow, learned_page
from icm_ray.suites import SUITES
from icm_ray.suites.bases import prepare_base
from icm_ray.workflows.evidence import _grams

VERSION = 1


def learned_on_ray(
    spec: LearnSpec,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    folder: Path,
    *,
    base: Path,
    shared: SharedBase,
    resources: Resources,
    seed: int,
    grams: Callable[[], Path],
    label: str,
    context: Context | None = None,
) -> Path:
    """Learn, or find what was learned in `folder`; return the folder.

    Args:
        spec: The learning recipe.
        files: All adapters of the merge.
        inputs: Unlabelled inputs of each task.
        readable: Heads and labels by task, where there are any.
        folder: Where the evidence goes.
        base: Folder of the base, for its tokenizer.
        shared: The base in the object store.
        resources: What each actor gets.
        seed: Keys the order of batches.
        grams: Gathers Gram statistics; called only if the recipe starts from RegMean.
        label: Shown by the progress bar.
        context: The Fusion-VAE whose latent moves; None: what the recipe's `parameters` say.
    """
    told = grams() if needs_grams(spec) else None
    run_as = shared.run_as(resources)
    key = _key(spec, files, inputs, readable, run_as, seed, resources.threads, told)
    key = sha256_of([key, *context.identity]) if context else key
    if is_done(folder, key):
        return folder
    tasks = task_inputs(files, inputs, readable, base, spec.optimisation.batch)
    adapters = [task.adapter for task in tasks]
    plan = plan_of(spec, adapters, _read_grams(told, files))
    scratch = folder.with_name(f".{folder.name}.learning-{key[:12]}")
    seconds = [cost_of(context.fusion)] if context else []

    def stage(plan: Plan, name: str = "") -> LearnedMerge:
        how, place = plan.spec.optimisation, scratch / name
        place.mkdir(parents=True, exist_ok=True)
        run = Run(seed, how.tasks_per_forward, how.save_memory, resources.threads)
        learned, cost = learn_on_ray(
            shared,
            LearnOrder(plan, tasks, run),
            covered_by(plan.spec.objective, tasks),
            resources,
            origin=plan.spec.model_dump(),
            scratch=place,
            key=key,
            label=f"{label} {name}".strip(),
        )
        seconds.append(cost)
        return learned

    learned = context.learn(stage, plan, adapters) if context else stage(plan)
    counts = {task: len(texts) for task, (texts, _) in inputs.items()}
    save_learned(learned, folder, {"key": key, "inputs": counts})
    write_json(folder / RUN_FILE, {"cpu_seconds": sum(seconds)})
    shutil.rmtree(scratch)
    return folder


def _read_grams(folder: Path | None, files: Sequence[AdapterFile]) -> Grams | None:
    """Return what Gram statistics say of the adapters, by module and task."""
    if folder is None:
        return None
    told, tasks = read_given(folder), [file.name for file in files]
    modules = sorted({module for file in files for module in file.shapes})
    found = {m: told.of(m, ["gram.<task>"], tasks) for m in modules}
    return {
        module: {name.removeprefix("gram."): tensor for name, tensor in of_module.items()}
        for module, of_module in found.items()
        if of_module
    }


def _beneath(residual: str | None) -> str | None:
    """Return what identifies a saved merge that learning starts on."""
    named = residual not in (None, "regmean")
    return open_adapter(Path(str(residual))).fingerprint() if named else None


def _key(
    spec: LearnSpec,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    base: str,
    seed: int,
    threads: int,
    told: Path | None,
) -> str:
    """Return what identifies a learned merge; `told` are Gram statistics it starts from."""
    content: dict[str, Any] = {
        "version": VERSION,
        "spec": spec.model_dump(),
        "adapters": {file.name: file.fingerprint() for file in files},
        "inputs": {task: inputs_key(*told) for task, told in inputs.items()},
        "heads": heads_key(readable),
        "base": base,
        "seed": seed,
        "threads": threads,
        "grams": read_given(told).identity if told else None,
        "beneath": _beneath(spec.start.residual),
    }
    return sha256_of(content)


def learn_and_write(recipe: LearnRecipe, target: Path) -> dict[str, Any]:
    """Learn a merge from unlabelled inputs, one actor a task; `merge` reads what it writes."""
    refuse_foreign(target)
    if (find_method(recipe.method).needs == FUSES) != bool(recipe.fusion):
        raise RecipeError(
            f"fusion: {recipe.fusion!r} with method {recipe.method!r}. Name the folder of "
            "jobs.train_fusion for icm_fusion, and for no other method."
        )
    context = None
    if recipe.fusion:
        spec, direct = context_specs(recipe.in_context, recipe.learn)
        context = Context(Path(recipe.fusion), direct)
    else:
        spec = spec_of(recipe.method, recipe.learn)
    refs = [(ref.name, Path(ref.path)) for ref in recipe.adapters]
    files = open_all(refs, recipe.modules_to_save)
    if context:  # before any spend; it is read again where it is used
        model = load_fusion(context.fusion)
        model.check_adapters({f.name: f.fingerprint() for f in files})
        if spec.start.residual:
            check_beneath(model.layout.gauge)
    readable = readable_of(recipe.heads, recipe.data, spec, files)
    inputs = load_inputs(recipe.data, [file.name for file in files])
    warn(warnings_of(files))
    base = prepare_base(recipe.base, recipe.cache, recipe.revision, progress=print)
    with connected(recipe.resources):
        _learned(spec, files, inputs, readable, base, target, recipe, context)
    told = load_learned(target).report
    for task, line in told["warnings"].items():
        warn([f"{task}: {line}"])
    first = told.get("latent", told)  # of two stages
    losses = {
        task: {
            "start": mean(first["losses"][task]["start"]),
            "end": mean(found["end"]),
        }
        for task, found in told["losses"].items()
    }
    for task, loss in losses.items():
        print(f"{task}: loss {loss['start']:.4f} at the start, {loss['end']:.4f} at the end")
    if told["unmoved"]:
        print(f"no path to a target, left at the start: {', '.join(told['unmoved'])}")
    report = _learned_page(recipe.method, target, files)
    return {"outputs": {"evidence": str(target), "report": str(report)}, "losses": losses}


def _learned_page(method: str, target: Path, files: list[AdapterFile]) -> Path:
    """Write the page about what was learned into a folder beside it; return the page."""
    with whole_folder(target.with_name(f"{target.name}.report")) as folder:
        page = learned_page(learned_row(method, target, files))
        (folder / "index.html").write_text(page, encoding="utf-8")
    return target.with_name(f"{target.name}.report") / "index.html"


def readable_of(
    heads: str | None, data: DataSpec, spec: LearnSpec, files: list[AdapterFile]
) -> dict[str, Readable]:
    """Return the heads and labels an objective may read.

    Args:
        heads: Folder of experts.
        data: Which inputs; their labels are read for supervised objectives alone.
        spec: Names the objective.
        files: The adapters.

    Raises:
        RecipeError: it reads heads and none are named, or the tasks' kinds are not known.
    """
    kind = spec.objective.kind
    if not reads_heads(spec):
        return {}
    if heads is None or data.suite is None:
        raise RecipeError(
            f"heads: objective {kind!r} reads the experts' heads. Run jobs.learn with heads: (a "
            "folder of experts) and data.suite, or choose an objective that reads none."
        )
    suite, experts = SUITES[data.suite], find_experts(Path(heads))
    missing = sorted({file.name for file in files} - set(experts))
    if missing:
        raise RecipeError(f"heads: {heads}: none for {', '.join(missing)}. Name their experts.")
    return readable_experts(
        suite,
        experts,
        [file.name for file in files],
        data,
        labelled=kind in LABELLED,
    )


def _learned(
    spec: LearnSpec,
    files: list[AdapterFile],
    inputs: Inputs,
    readable: dict[str, Readable],
    base: Path,
    folder: Path,
    recipe: MergeRecipe | LearnRecipe,
    context: Context | None = None,
) -> Path:
    grams, shared = folder.with_name(f"{folder.name}.grams"), share_base(base)
    return learned_on_ray(
        spec,
        files,
        inputs,
        readable,
        folder,
        base=base,
        shared=shared,
        resources=recipe.resources,
        seed=recipe.seed,
        grams=lambda: _grams(files, inputs, shared, grams, recipe, EVIDENCE_BATCH),
        label=recipe.method,
        context=context,
    )


def learned_row(name: str, folder: Path, files: list[AdapterFile]) -> LearnedRow:
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
