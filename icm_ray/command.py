"""What every command does around its work: recipe, errors in one line, exit code, results.json."""

import argparse
import errno
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from icm_ray.config import Recipe, load_recipe, output_folder
from icm_ray.errors import ICMRayError, ResourceError, one_line
from icm_ray.files import write_json

R = TypeVar("R", bound=Recipe)
RESULTS = "results.json"
INTERRUPTED, TERMINATED = 130, 143


class _Terminated(BaseException):
    """SIGTERM, raised so that temporary folders are removed on the way out."""


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

    `results.json` says how it went: in the output folder after success, beside it (as
    `<output>.results.json`) after a failure, since a failed job leaves no output folder behind.
    """
    parser = argparse.ArgumentParser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", required=True, help="recipe (YAML)")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    target: Path | None = None

    def job() -> dict[str, Any]:
        nonlocal target
        recipe = load_recipe(kind, options.config, options.overrides)
        target = output_folder(recipe, recipe.output_path)
        return work(recipe, target)

    code, problems, found = guarded(job, debug=options.debug)
    if target is not None:
        _write_results(target, code, problems, found)
    return code


def guarded(
    work: Callable[[], dict[str, Any]], *, debug: bool
) -> tuple[int, list[str], dict[str, Any]]:
    """Run `work`; return exit code, problems and its result, having told every problem on stderr.

    Unless `debug`, no traceback is shown: each problem is one line starting with "error: ".
    """
    previous = signal.signal(signal.SIGTERM, _terminate)
    code, problems = 0, []
    try:
        return 0, [], work()
    except ICMRayError as error:
        code, problems, cause = error.exit_code, list(error.problems), error
    except (MemoryError, OSError) as error:
        cause = error
        full = isinstance(error, MemoryError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = ResourceError.exit_code if full else 1
        problems = [one_line(f"{type(error).__name__}: {error}")]
    except KeyboardInterrupt as error:
        code, problems, cause = INTERRUPTED, ["interrupted. Run the same command to resume."], error
    except _Terminated as error:
        code, problems, cause = TERMINATED, ["terminated. Run the same command to resume."], error
    except Exception as error:  # a bug of ours: still one line, still a code
        code, cause = 1, error
        problems = [one_line(f"internal: {type(error).__name__}: {error}. Run with --debug.")]
    finally:
        signal.signal(signal.SIGTERM, previous)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if debug:
        traceback.print_exception(cause)
    return code, problems, {}


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _write_results(target: Path, code: int, problems: list[str], found: dict[str, Any]) -> None:
    beside = target.with_name(f"{target.name}.{RESULTS}")
    status = {"status": "failed" if code else "done", "exit_code": code, "problems": problems}
    content = _plain({"outputs": {}, "scores": {}, **found, **status})
    try:
        if code or not target.is_dir():
            beside.parent.mkdir(parents=True, exist_ok=True)
            write_json(beside, content)
        else:
            write_json(target / RESULTS, content)
            beside.unlink(missing_ok=True)
    except OSError as error:
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
