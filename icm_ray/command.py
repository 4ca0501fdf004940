"""What every command does around its work: recipe, errors in one line, exit code, results.json."""

import argparse
import contextlib
import errno
import importlib
import logging
import math
import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from icm_ray import interruption
from icm_ray.config import INSECURE_VARIABLE, Recipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import ICMRayError, InputError, ResourceError, masked, one_line
from icm_ray.files import FULL, RESULTS_FILE, errno_of, write_json
from icm_ray.locks import locked
from icm_ray.storage import fetch, held, locate, publish
from icm_ray.suites.own_scorer import allowing

R = TypeVar("R", bound=Recipe)
TERMINATED = 143

_NO_MEMORY = re.compile(r"MemoryError|DefaultCPUAllocator: can't allocate memory")
_OF_PATHS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


class _Terminated(BaseException):
    """SIGTERM, raised so that temporary folders are removed on the way out."""


class Job:
    """One entry point: a recipe's class, and the module whose `run(recipe, target)` does it.

    Modules are imported when they are asked, so that `--help` and a wrong recipe are told at once.
    """

    def __init__(
        self,
        kind: type[Recipe],
        workflow: str,
        planner: str | None = None,
        checker: str | None = None,
    ) -> None:
        """Take the recipe's class and the full name of its module, and of what plans it, if any.

        The last one's `check(recipe)` refuses what can be refused without the others.
        """
        self.kind, self.workflow = kind, workflow
        self.planner, self.checker = planner, checker

    def __call__(self, recipe: Any, target: Path) -> dict[str, Any]:
        """Run on the cluster that RAY_ADDRESS or the submitted job gives, else on a local one."""
        self._check(recipe)
        return importlib.import_module(self.workflow).run(recipe, target)

    def plan(self, recipe: Any) -> dict[str, Any]:
        """Return what the job would do and need; `summary` is for people."""
        assert self.planner is not None
        self._check(recipe)
        return importlib.import_module(self.planner).plan(recipe)

    def _check(self, recipe: Any) -> None:
        if self.checker is not None:
            importlib.import_module(self.checker).check(recipe)

    def main(self, usage: str | None) -> NoReturn:
        """Run from this process's command line, and end it with the exit code."""
        quiet_libraries()
        sys.exit(run_job(self.kind, self, usage or ""))


def run_job(
    kind: type[R],
    work: Callable[[R, Path], dict[str, Any]],
    usage: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a job from its command line and return its exit code.

    Args:
        kind: The recipe class.
        work: Gets the recipe and its output folder; returns `outputs` and `scores`.
        usage: The job's docstring, shown by --help.
        arguments: Command line without the program; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", required=True, help="recipe (YAML)")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--insecure-cluster",
        action="store_true",
        help="join a cluster at RAY_ADDRESS that asks for no token",
    )
    options = parser.parse_args(arguments)
    if options.insecure_cluster:
        os.environ[INSECURE_VARIABLE] = "1"
    return run_recipe(kind, work, options.config, options.overrides, debug=options.debug)


def run_recipe(
    kind: type[R],
    work: Callable[[R, Path], dict[str, Any]],
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    *,
    debug: bool,
) -> int:
    """Load a recipe, run `work` on it in its output folder, report; return the exit code.

    `config` is a YAML file, or the values themselves where a command line says all of them.

    `results.json` says how it went: in the output folder after success, beside it (as
    `<output>.results.json`) after a failure, since a failed job leaves no output folder behind. A
    job that finds another one at its output writes neither.
    """
    place: tuple[Path, str | None] | None = None
    with contextlib.ExitStack() as stack:

        def job() -> dict[str, Any]:
            nonlocal place
            recipe = load_recipe(kind, config, overrides)
            stack.enter_context(allowing(recipe.allow_code))
            target, address = locate(recipe)
            stack.enter_context(locked(target))
            if address:
                stack.enter_context(held(address))
            place = target, address  # from here on results are ours to write
            if address:
                fetch(address, target)
            return work(recipe, target)

        code, problems, found = guarded(job, debug=debug)
        if place is not None:
            target, address = place
            _write_results(target, code, problems, found)
            if address:
                failed, *_ = guarded(lambda: _upload(target, address), debug=debug)
                return code or failed
    return code


def _upload(target: Path, address: str) -> dict[str, Any]:
    """Mirror what there is; a failed job's finished stages too, so that a rerun resumes."""
    if target.is_dir():
        publish(target, address)
    beside = target.with_name(f"{target.name}.{RESULTS_FILE}")
    if beside.is_file():
        publish(beside, f"{address}.{RESULTS_FILE}")
    return {}


def guarded(
    work: Callable[[], dict[str, Any]], *, debug: bool
) -> tuple[int, list[str], dict[str, Any]]:
    """Run `work`; return exit code, problems and its result, having told every problem on stderr.

    Unless `debug`, no traceback is shown: each problem is one line starting with "error: ".
    """
    code, problems = 0, []
    with _signals():
        try:
            return 0, [], work()
        except ICMRayError as error:
            code, problems, cause = error.exit_code, list(error.problems), error
        except (KeyboardInterrupt, _Terminated, Exception) as error:
            cause = error
            code, problems = _interruption(error) or _failed_call(error) or _bug(error)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if debug:
        print(masked("".join(traceback.format_exception(cause))), end="", file=sys.stderr)
    return code, problems, {}


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let signals raise, so that what is half done is cleaned up; before and after, none has to."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    waiting = signal.getsignal(signal.SIGINT) is interruption.leave
    if waiting:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        if waiting:
            signal.signal(signal.SIGINT, interruption.leave)


def _interruption(error: BaseException | None) -> tuple[int, list[str]] | None:
    """Return code and problem if a signal is what ended the work.

    Compiled code that a signal interrupts, such as Ray's waits, may raise a SystemError around it.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return interruption.CODE, [interruption.PROBLEM]
        if isinstance(error, _Terminated):
            return TERMINATED, ["terminated. Run the same command to resume."]
        error = error.__cause__
    return None


def _failed_call(error: BaseException | None) -> tuple[int, list[str]] | None:
    """Return code and problem if a call to the operating system is what failed the work.

    Compiled code tells of a full disk or of too little memory in an error of its own.
    """
    while error is not None:
        number = errno.ENOMEM if _NO_MEMORY.search(repr(error)) else errno_of(error)
        if number == errno.ENOMEM:
            advice = "Use fewer adapters at once, fewer workers, or a larger machine."
            return ResourceError.exit_code, [one_line(f"memory: ran out ({error!r}). {advice}")]
        if number is not None:
            where = getattr(error, "filename", None)
            reason = one_line(f"{where or 'files'}: {os.strerror(number)}")
            if number in FULL:
                return ResourceError.exit_code, [f"{reason}{_free(where)}. Free some disk space."]
            code = InputError.exit_code if where and number in _OF_PATHS else 1
            return code, [f"{reason}. Check the path."]
        error = error.__cause__
    return None


def _free(where: object) -> str:
    parents = Path(str(where)).absolute().parents if where else []
    place = next((parent for parent in parents if parent.is_dir()), None)
    return f", {shutil.disk_usage(place).free} bytes are free" if place else ""


def _bug(error: BaseException) -> tuple[int, list[str]]:
    """A bug of ours: still one line, still a code."""
    return 1, [one_line(f"internal: {type(error).__name__}: {error}. Run with --debug.")]


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _write_results(target: Path, code: int, problems: list[str], found: dict[str, Any]) -> None:
    beside = target.with_name(f"{target.name}.{RESULTS_FILE}")
    status = {"status": "failed" if code else "done", "exit_code": code, "problems": problems}
    content = _plain({"outputs": {}, "scores": {}, **found, **status})
    try:
        if code or not target.is_dir():
            beside.parent.mkdir(parents=True, exist_ok=True)
            write_json(beside, content)
        else:
            write_json(target / RESULTS_FILE, content)
            beside.unlink(missing_ok=True)
    except OSError as error:
        if code != ResourceError.exit_code:  # else that the disk is full has been said
            print(f"error: {beside}: {error.strerror}", file=sys.stderr)


def _plain(value: Any) -> Any:
    """Return `value` with null for what JSON cannot hold: a score over an expert's 0 is NaN."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quiet_libraries() -> None:
    """Keep libraries from talking over our own output, and from reaching for a network."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns at every 8-bit product
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_place: Any) -> None:
    """Tell a warning that is meant for users in one line; those for programmers are not shown."""
    if category is UserWarning:
        print(f"warning: {one_line(str(message))}", file=sys.stderr)
