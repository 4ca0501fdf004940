"""Task suites: real labelled text and images, the base models for them, and a user's own data.

`SUITES` is the whole table; importing it loads neither torch nor transformers nor ray.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.suites.bases import BASES, PackagedBase, default_cache, prepare_base
from icm_ray.suites.folder import load_folder
from icm_ray.suites.opening import SUITE_FILE, checked_suite, open_suite
from icm_ray.suites.own_scorer import allowing, is_allowed
from icm_ray.suites.remote import fetched
from icm_ray.suites.suite import Suite
from icm_ray.suites.tasks import SPLITS, Examples, Task


class _Packaged(Mapping[str, Suite]):
    """Suites that come with the package, each opened when it is asked for."""

    names = ("text", "lm", "generation", "vision", "many", "detection", "dense", "imagetext")

    def __getitem__(self, name: str) -> Suite:
        if name not in self.names:
            raise KeyError(name)
        return getattr(import_module(f"icm_ray.suites.{name}"), name.upper())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


SUITES: Mapping[str, Suite] = _Packaged()
"""Every suite that comes with the package, by name."""

_opened: dict[tuple[object, ...], Suite] = {}


def find_suite(name: str, key: str = "suite") -> Suite:
    """Return a suite by its name in `SUITES`, or a user's by its folder or address, checked whole.

    Raises:
        RecipeError: at the recipe's `key`, there is no such suite; or all that is wrong with its
            `suite.yaml`.
        InputError: all that is wrong with its data.
    """
    if name in SUITES:
        return SUITES[name]
    folder = fetched(name) if "://" in name else Path(name).expanduser()
    if not folder.is_dir():
        raise RecipeError(
            f"{key}: {name!r} but a folder with {SUITE_FILE}, or one of {', '.join(SUITES)} is "
            f"expected.{did_you_mean(name, SUITES)}"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stamps = tuple((p.name, (s := p.stat()).st_mtime_ns, s.st_size) for p in files)
    stamp = (folder.resolve(), stamps, is_allowed())
    if stamp not in _opened:  # jobs ask for it in each of their stages
        _opened.clear()
        _opened[stamp] = checked_suite(folder)
    return _opened[stamp]


__all__ = [
    "BASES",
    "SPLITS",
    "SUITES",
    "SUITE_FILE",
    "Examples",
    "PackagedBase",
    "Suite",
    "Task",
    "allowing",
    "checked_suite",
    "default_cache",
    "find_suite",
    "load_folder",
    "open_suite",
    "prepare_base",
]
