"""`icm-ray`: look at adapters, plan a merge, merge in this process, verify and reproduce.

No Ray here but in `run`, which is `python -m jobs.JOB` wherever the package is installed.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icm_ray.command import guarded, quiet_libraries, run_recipe
from icm_ray.config import MergeRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import InputError, RecipeError, did_you_mean, one_line
from icm_ray.jobs import JOBS
from icm_ray.merging.requirements import check_sources
from icm_ray.methods import METHODS

app = typer.Typer(
    help="Merge many LoRA adapters of one base model into one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _place(text: str) -> Path:
    """Return a path; a shell leaves a `~` alone that is quoted."""
    return Path(text).expanduser()


PATH: Any = {"parser": _place, "metavar": "PATH"}
Config = Annotated[Path, typer.Option("-c", "--config", help="Recipe (YAML).", **PATH)]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value")]
Planned = Annotated[
    list[str] | None, typer.Argument(metavar="[JOB] [KEY=VALUE]...", help="merge unless said.")
]
Folder = Annotated[Path, typer.Argument(help="A merged adapter's folder.", **PATH)]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
_CHANGE = re.compile(r"[A-Za-z_][\w.\[\]-]*=")
"""How a change of a recipe starts; what does not is an adapter."""
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def main() -> None:
    """Run the command line; exit codes: 0 done, 2 recipe, 3 input, 4 disk or memory."""
    quiet_libraries()
    app()


def _finish(work: Callable[[], Any], debug: bool) -> None:
    code, _, _ = guarded(lambda: {"result": work()}, debug=debug)
    if code:
        raise typer.Exit(code)


def _job_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the job that a plan is of, the first word unless that is a change, and the changes."""
    if not words or _CHANGE.match(words[0]):
        return "merge", words
    planned = [name for name, job in JOBS.items() if job.planner]
    if words[0] not in planned:
        raise RecipeError(
            f"job: {words[0]!r} has no plan, but one of {', '.join(planned)} is expected, or a "
            f"change as key=value.{did_you_mean(words[0], planned)}"
        )
    return words[0], words[1:]


def _console() -> Console:
    # A pipe has no width; lines of a table must not break there.
    return Console(width=None if sys.stdout.isatty() else 160)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the merge methods by family, or show one: what it does, when, at what cost."""
    from icm_ray.methods import find_method
    from icm_ray.report.method_table import method_list, method_page

    def work() -> None:
        rows = {name: find_method(name)} if name else METHODS
        if as_json:
            print(json.dumps({key: row.schema() for key, row in rows.items()}, indent=2))
            return
        console = _console()
        if name:
            row = rows[name]
            page = method_page(name, row.schema(), row.family, row.doc)
            console.print(page)
        else:
            facts = {key: row.facts() for key, row in rows.items()}
            families = {key: row.family for key, row in rows.items()}
            console.print(method_list(facts, families, console.width))

    _finish(work, debug)


@app.command()
def import_recipe(
    source: Annotated[Path, typer.Argument(help="mergekit YAML, or Python.", **PATH)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", **PATH)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    debug: Debug = False,
) -> None:
    """Turn a mergekit YAML, or a PEFT add_weighted_adapter call, into a merge recipe.

    The file is read, never run. What cannot be carried over is refused, all of it at once.
    """
    from icm_ray.importing import import_recipe as read_recipe
    from icm_ray.importing import recipe_text, write_recipe
    from icm_ray.merging.estimate import warn

    def work() -> None:
        imported = read_recipe(source)
        if output is None:
            print(recipe_text(imported), end="")
        else:
            write_recipe(imported, output, overwrite=overwrite)
            print(f"{output}: written. Next: icm-ray plan -c {output}")
        warn(imported.warnings)

    _finish(work, debug)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder with <task>.jsonl files.", **PATH)],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Adapters.")],
    debug: Debug = False,
) -> None:
    """Write a suite.yaml and a recipe to start from, out of adapters and data files."""
    from icm_ray.importing.first_files import look, write_first_files
    from icm_ray.merging.estimate import warn

    def work() -> None:
        found = look(folder, adapters)
        suite, recipe = write_first_files(found)
        warn(found.notes)
        print(f"{suite}: written; look at what is marked as guessed.")
        print(f"{recipe}: written. Next: icm-ray run pipeline -c {recipe}")

    _finish(work, debug)


@app.command()
def inspect(
    folders: Annotated[list[Path], typer.Argument(help="Adapter folders.", **PATH)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show adapters: rank, scaling, size, norm, warnings, and whether they fit together."""
    from icm_ray.merging.estimate import inspect_adapters, warn
    from icm_ray.report.adapter_table import adapter_table

    def work() -> None:
        found = inspect_adapters(folders)
        if as_json:
            print(json.dumps(found, indent=2))
            _refuse(found["problems"])
            return
        _console().print(adapter_table(found["adapters"]))
        warn(found["warnings"])
        for a, others in found["cosines"].items():
            shown = "  ".join(f"{b} {value:+.3f}" for b, value in others.items())
            print(f"cosine of deltas, {a}: {shown}")
        for line in found["readings"]:
            print(one_line(line))
        _refuse(found["problems"])

    _finish(work, debug)


@app.command()
def plan(
    config: Config, words: Planned = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Say before any spend whether adapters fit, and what a job will cost and make.

    A merge's plan is read from file headers; that of a job that runs the base times a few of its
    own inputs.
    """

    def work() -> None:
        job, changes = _job_of(words or [])
        recipe: Any = load_recipe(JOBS[job].kind, config, changes)
        found = JOBS[job].plan(recipe)
        from icm_ray.merging.estimate import warn  # once the recipe is right

        if as_json:
            print(json.dumps(found, indent=2))
            return
        table = Table(title=f"plan: {getattr(recipe, 'method', job)}", show_header=False)
        for name, value in found["summary"].items():
            table.add_row(name, escape(one_line(str(value))))
        _console().print(table)
        warn(found["warnings"])

    _finish(work, debug)


@app.command()
def merge(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADAPTER]... [KEY=VALUE]...", help="Adapters, or changes."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="Recipe (YAML).", **PATH)
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method, where no recipe names one.")] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    earlier: Annotated[
        str | None, typer.Option("--from", help="A merge that kept its factors, to start from.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Adapter of that merge to leave out.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Merge in this process, without Ray: data-free and ready-evidence methods.

    A recipe says what, or the command line alone does: ADAPTER... --method NAME -o FOLDER, or
    --from MERGED [ADAPTER...] [--remove NAME]... -o FOLDER for a merge with keep_factors=true.
    """
    changes = [word for word in words or [] if _CHANGE.match(word)]
    said = {
        "adapters": [word for word in words or [] if not _CHANGE.match(word)],
        "method": method,
        "output": output,
        "earlier": earlier,
        "remove": remove,
    }
    said = {key: value for key, value in said.items() if value}
    needed = {"output", "earlier"} if earlier else {"output", "adapters", "method"}
    if said if config else not needed <= said.keys() or (remove and not earlier):
        _finish(_refuse_half, debug)
    code = run_recipe(MergeRecipe, _merge_here, config or said, changes, debug=debug)
    if code:
        raise typer.Exit(code)


def _merge_here(recipe: MergeRecipe, target: Path) -> dict[str, Any]:
    check_sources(recipe, can_gather=False)
    from icm_ray.merging.recipe import merge_here  # once the recipe is right

    return merge_here(recipe, target)


def _refuse_half() -> NoReturn:
    raise RecipeError(
        "command line: expected is either a recipe, -c FILE, or all that it would say: "
        "ADAPTER... --method NAME -o FOLDER, or --from MERGED [ADAPTER...] [--remove NAME]... "
        "-o FOLDER. Changes (key=value) go with each."
    )


@app.command()
def run(
    job: Annotated[str, typer.Argument(metavar="JOB", help=f"One of {', '.join(JOBS)}.")],
    config: Config,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Run a job on Ray, as `python -m jobs.JOB` does in a checkout."""
    if job not in JOBS:
        _finish(lambda: _refuse_job(job), debug)
    code = run_recipe(JOBS[job].kind, JOBS[job], config, overrides or [], debug=debug)
    if code:
        raise typer.Exit(code)


def _refuse_job(job: str) -> NoReturn:
    raise RecipeError(
        f"command line: {job!r} but one of {', '.join(JOBS)} is expected.{did_you_mean(job, JOBS)}"
    )


@app.command()
def verify(
    folder: Folder,
    base: Annotated[str | None, typer.Option(help="Also compare whole forward passes.")] = None,
    debug: Debug = False,
) -> None:
    """Check a merged folder: hashes, PEFT's reading, norms, and the forward pass of a base."""
    from icm_ray.merging.proof import verify_folder
    from icm_ray.suites import prepare_base

    def work() -> None:
        found = verify_folder(folder, prepare_base(base, progress=print) if base else None)
        print(f"{folder}: intact. " + ", ".join(f"{k} {v}" for k, v in found.items()))

    _finish(work, debug)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder.", **PATH)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", **PATH)],
    base: Annotated[str | None, typer.Option(help="Base: alias, folder or hub id.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="model, or an adapter for kohya, diffusers or mlx.")
    ] = "model",
    debug: Debug = False,
) -> None:
    """Write base plus adapter as a whole model, or the adapter in another tool's format."""
    from icm_ray.adapters import open_adapter
    from icm_ray.exporting import ADAPTER_FORMATS, export_adapter, export_model, serving_lines
    from icm_ray.files import check_place
    from icm_ray.locks import locked
    from icm_ray.merging.cut import serving_rank
    from icm_ray.suites import prepare_base

    def work() -> None:
        if form not in ("model", *ADAPTER_FORMATS):
            known = ["model", *ADAPTER_FORMATS]
            raise RecipeError(
                f"--format: {form!r} but one of {', '.join(known)} is expected."
                f"{did_you_mean(form, known)}"
            )
        if form == "model" and base is None:
            raise RecipeError("--base: missing but a whole model is made from one. Name it.")
        file = open_adapter(folder)
        check_place(output.absolute())
        with locked(output.absolute()):
            if form != "model":
                export_adapter(file, form, output)
                print(f"{output}: written.")
                return
            place = prepare_base(str(base), progress=print)
            export_model(file, place, output)
        print(f"{output}: written.")
        print("\n".join(serving_lines(output, place, folder, serving_rank([file.max_rank]))))

    _finish(work, debug)


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="A trained model: folder or hub id.")],
    base: Annotated[str, typer.Option(help="What it was trained from: alias, folder or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", **PATH)],
    rank: Annotated[str, typer.Option(help="A rank, energy:0.9 or exact.")] = "16",
    debug: Debug = False,
) -> None:
    """Write what full fine-tuning changed in a base's linear layers as an adapter."""
    from icm_ray.exporting import extract_adapter
    from icm_ray.files import check_place
    from icm_ray.locks import locked
    from icm_ray.merging.estimate import warn
    from icm_ray.suites import prepare_base

    def work() -> None:
        check_place(output.absolute())
        with locked(output.absolute()):
            after, before = (prepare_base(name, progress=print) for name in (model, base))
            policy = int(rank) if rank.isdigit() else rank
            found = extract_adapter(after, before, output, policy, base)
        warn(found.lines)
        print(
            f"{output}: {found.modules} layers, rank {found.rank}, {found.kept:.2%} of all change."
        )

    _finish(work, debug)


@app.command()
def push(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", help="Repository: org/name.")],
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is new.")] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go there.")] = False,
    debug: Debug = False,
) -> None:
    """Upload a verified merge to the Hugging Face hub, in one commit."""
    from icm_ray.exporting import has_token, plan_upload, upload_lines
    from icm_ray.exporting import push as upload_to_hub
    from icm_ray.merging.estimate import warn

    def work() -> None:
        upload = plan_upload(folder, to, revision)
        print("\n".join(upload_lines(upload, private=private)))
        warn(upload.warnings)
        if dry_run:
            print(f"token: {'ready' if has_token() else 'none, set HF_TOKEN or run hf auth login'}")
            print("nothing was uploaded.")
            return
        print(f"{folder}: uploaded, {upload_to_hub(upload, private=private)}")

    _finish(work, debug)


@app.command()
def reproduce(folder: Folder, debug: Debug = False) -> None:
    """Merge again from the inputs and compare every file's sha256."""
    from icm_ray.merging.proof import reproduce as rebuild

    def work() -> None:
        names = rebuild(folder)
        print(f"{folder}: reproduced, {len(names)} files equal ({', '.join(names)})")

    _finish(work, debug)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise InputError(problems)
