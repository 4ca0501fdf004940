"""The experts of a recipe, set by set: ready ones where they are exactly these, else trained."""

from collections.abc import Mapping
from pathlib import Path

from icm_ray.adapters import AdapterFile, open_adapter
from icm_ray.adapters.blocks import ends_in
from icm_ray.config import FinetuneRecipe
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.finetune import ExpertOrder, train_groups
from icm_ray.distributed.probes import ProbeOrder, fit_probes, read_probe
from icm_ray.distributed.session import Session
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import Expert
from icm_ray.files import is_done, sha256_of
from icm_ray.finetuning.expert import ExpertJob, Lesson
from icm_ray.suites import Suite, find_suite
from icm_ray.suites.bases import base_name

VERSION = 1
"""Raise it when training or one of its defaults changes: older experts are not today's."""


def expert_key(
    job: ExpertJob,
    base: str,
    data: str,
    recipe: FinetuneRecipe,
    start: AdapterFile | None = None,
) -> str:
    """Return what identifies an expert's bytes: base, data and every hyper-parameter."""
    company = {"together": list(job.together)} if len(job.together) > 1 else {}
    return sha256_of(
        {
            "version": VERSION,
            "base": base,
            "data": data,
            "task": job.task.name,
            # Without defaults, so that a new setting does not disown the experts there are.
            "lora": job.lora.model_dump(exclude_defaults=True, exclude={"start"}),
            "training": job.training.model_dump(
                exclude_defaults=True, exclude={"save_every", "tasks_per_forward"}
            ),
            "set": job.which.label,
            "validation": recipe.sizes.validation,  # chose the probe the expert starts from
            "dtype": recipe.dtype,
            **company,
            **({"start": start.fingerprint} if start else {}),
        }
    )


def start_of(recipe: FinetuneRecipe) -> AdapterFile | None:
    """Return the adapter that training goes on from, if there is one.

    Raises:
        InputError: it cannot be read.
        RecipeError: a new LoRA of the recipe cannot hold it.
    """
    if recipe.lora.start is None:
        return None
    file, lora = open_adapter(recipe.lora.start), recipe.lora
    rank = max(rank for _, _, rank in file.shapes.values())
    problems = []
    if rank > lora.rank:
        problems.append(
            f"lora.start: {file.path} has rank {rank} but lora.rank is {lora.rank}. Merge it with "
            f"output.rank={lora.rank}, or raise lora.rank."
        )
    ends = (
        lora.targets if isinstance(lora.targets, list) else None
    )  # a pattern is the base's to tell
    if ends and (strange := [module for module in file.shapes if not ends_in(module, ends)]):
        problems.append(
            f"lora.start: {file.path} adapts {strange[0]} and {len(strange) - 1} more but "
            f"lora.targets are {', '.join(ends)}. Name them, too."
        )
    if file.layouts:
        problems.append(f"lora.start: {file.path} adapts more than linear layers. Start anew.")
    if problems:
        raise RecipeError(problems)
    return file


def groups_of(recipe: FinetuneRecipe, suite: Suite) -> list[tuple[str, ...]]:
    """Return which tasks share forward passes: those that read about as much, so little is padded.

    The recipe alone says so, never the cluster.
    """
    tasks = sorted(
        recipe.tasks or suite.tasks, key=lambda name: (suite.tasks[name].max_tokens, name)
    )
    size = recipe.training.tasks_per_forward
    return [tuple(tasks[first : first + size]) for first in range(0, len(tasks), size)]


def expert_jobs(recipe: FinetuneRecipe, suite: Suite) -> dict[tuple[str, str], ExpertJob]:
    """Return every expert of the recipe by (set label, task)."""
    together = {task: group for group in groups_of(recipe, suite) for task in group}
    return {
        (which.label, task): ExpertJob(
            suite.tasks[task], recipe.lora, recipe.training, which, together[task]
        )
        for which in recipe.sets
        for task in recipe.tasks or suite.tasks
    }


def find_or_train(
    session: Session, recipe: FinetuneRecipe, root: Path, ready: str | None = None
) -> dict[str, dict[str, Expert]]:
    """Train every expert that is not there yet; return all by set and task.

    Args:
        session: The base, and what each worker gets.
        recipe: Suite, sets and hyper-parameters.
        root: Experts go to `<root>/experts/<set>/<task>/`, each whole or not at all, and their
            checkpoints to `<root>/trajectories/<set>/<task>/`.
        ready: Folder of the same layout whose experts are used where they are exactly these.
    """
    suite = find_suite(recipe.suite)
    jobs, start = expert_jobs(recipe, suite), start_of(recipe)
    base = session.shared.fingerprint
    keys = {
        place: expert_key(job, base, suite.fingerprint(job.task.name), recipe, start)
        for place, job in jobs.items()
    }
    folders = {place: root.joinpath("experts", *place) for place in jobs}
    for place in jobs if ready else ():
        if is_done(committed := Path(str(ready)).joinpath(*place), keys[place]):
            folders[place] = committed
    missing = dict.fromkeys(
        (label, jobs[label, task].together)
        for label, task in jobs
        if not is_done(folders[label, task], keys[label, task])
    )
    if missing:
        if recipe.resources.offload:
            raise RecipeError(
                "resources.offload: true but experts are trained on a base that is whole on the "
                "device. Leave it out, or name ready adapters."
            )
        # All of them, so that one more expert does not find other heads.
        probes = probes_of(session, recipe, root)
        heads = {task: read_probe(folder)[0] for task, folder in probes.items()}

        def order(place: tuple[str, str]) -> ExpertOrder:
            task = place[1]
            train = suite.load(task, "train").first(recipe.training.train_examples)
            return ExpertOrder(
                Lesson(jobs[place], train, heads.get(task), start),
                folders[place],
                suite.fingerprint(task),
                base_name(str(recipe.base or suite.base)),
                recipe.dtype,
                keys[place],
            )

        train_groups(
            session,
            {
                root / "experts" / label / tasks[0]: [order((label, task)) for task in tasks]
                for label, tasks in missing
            },
        )
    experts: dict[str, dict[str, Expert]] = {}
    for (label, task), folder in folders.items():
        experts.setdefault(label, {})[task] = Expert(task, folder)
    return experts


def probes_of(session: Session, recipe: FinetuneRecipe, root: Path) -> Mapping[str, Path]:
    """Return the folder of each headed task's refitted linear probe, fitted if it is not there.

    A probe sees the same training examples as its task's experts, which start from its head, and
    reads them through the adapter that they start from, if there is one.
    """
    suite, start = find_suite(recipe.suite), start_of(recipe)
    limits = {"validation": recipe.sizes.validation, "test": recipe.sizes.test}
    orders, folders = {}, {}
    for task in recipe.tasks or suite.tasks:
        if suite.tasks[task].headed:
            folders[task] = root / "probes" / task
            train = suite.load(task, "train").first(recipe.training.train_examples)
            splits = {"train": train}
            splits |= {name: suite.load(task, name, limit) for name, limit in limits.items()}
            source = AdapterSource(start) if start else None
            orders[folders[task]] = ProbeOrder(suite.tasks[task], splits, source)
    fit_probes(session, orders)
    return folders
