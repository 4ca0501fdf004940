"""Recipes from YAML files, read strictly: every problem of a file in one go, one line each.

    load_recipe(MergeRecipe, "configs/merge/soup.yaml", ["output.rank=8", "seed=1"])

Unknown keys are errors with the nearest known key; `key=value` overrides use the same dotted names.
"""

import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from icm_ray.config import Recipe
from icm_ray.config.places import with_places
from icm_ray.errors import RecipeError, did_you_mean

MAX_RECIPE_BYTES = 1_000_000
MAX_DEPTH = 20
COMMAND_LINE = "command line"
"""Named in errors about a recipe that is in no file."""
R = TypeVar("R", bound=Recipe)
M = TypeVar("M", bound=BaseModel)

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""Numbers such as 1e-3, which YAML 1.1 takes for text and everybody else for numbers."""


def load_recipe(
    kind: type[R], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> R:
    """Read, override and check a recipe.

    Args:
        kind: The recipe class.
        source: YAML file, at most 1 MB; or the values themselves, from a command line.
        overrides: `dotted.key=value`; values are YAML.

    Raises:
        RecipeError: every problem of the file and the overrides, one line each.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if isinstance(source, Mapping):
        values, source = dict(source), Path(COMMAND_LINE)
    else:
        source = Path(source).expanduser()
        values = read_yaml(source)
    # An override may hold a pasted secret as well, so only its key is repeated.
    keys = [override.partition("=")[0] for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if not re.match(r"^[A-Za-z_][\w.\[\]-]*=", override):
            raise RecipeError(f"{key}: not of the form key=value. Write for example seed=1.")
    try:
        config = OmegaConf.create(values)
        config.merge_with_dotlist(list(overrides))
        # No interpolation: a recipe says what it says.
        plain = _at_home(OmegaConf.to_container(config))
        recipe = checked(kind, source, plain)
        return with_places(recipe, recipe.storage)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, IndexError) as error:
        where = f"with {', '.join(keys)} set: " if keys else ""
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise RecipeError(f"{source}: {where}{what}. Write plain YAML values.") from None


def checked(kind: type[M], source: Path, values: Any) -> M:
    """Return a file's plain values as what they should be.

    Raises:
        RecipeError: every problem, one line each.
    """
    _refuse_no_text(source, values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_problem(kind, source, item) for item in error.errors()]
        raise RecipeError(dict.fromkeys(lines)) from None


def _at_home(value: Any) -> Any:
    """Return plain data with the home folder in the place of a leading `~/`."""
    if isinstance(value, dict):
        return {key: _at_home(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value[:2] == "~/" else value


def read_yaml(source: Path) -> dict[str, Any]:
    """Return a YAML file's table, read safely: plain values only, no code, no billion laughs.

    Raises:
        RecipeError: it is missing, too large, or no table of plain values.
    """
    import yaml

    if not source.is_file():
        raise RecipeError(f"{source}: no such recipe. Look in configs/ for ready ones.")
    if source.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{source}: over {MAX_RECIPE_BYTES} bytes. A recipe is a short text.")
    try:
        text = source.read_text(encoding="utf-8")
        _check_events(source, text)
        values = _plain_loader()(text).get_single_data()
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: not UTF-8. Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or type(error).__name__
        raise RecipeError(f"{source}: {where}not plain YAML ({what}).") from None
    except ValueError as error:  # a date or number that looks like one and is none
        raise RecipeError(f"{source}: not plain YAML ({error}).") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{source}: {type(values).__name__} but a table of keys is expected.")
    return values


def _plain_loader() -> Any:
    """Return YAML's safe loader, taught that 1e-3 is a number."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        pass

    PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return PlainLoader


def _check_events(source: Path, text: str) -> None:
    """Refuse aliases, deep nesting, and a key given twice, of which YAML would take the last.

    Reads the text as a stream and stops at the first of these, so none can exhaust anything.
    """
    import yaml

    open_tables: list[set[str] | None] = []  # the keys of each open table; None for a list
    key_next: list[bool] = []
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):  # an alias bomb needs them; no recipe does
            raise RecipeError(f"{source}: YAML aliases (*name) are not allowed. Write it out.")
        if isinstance(event, yaml.CollectionEndEvent):
            open_tables.pop()
            key_next.pop()
        elif isinstance(event, yaml.NodeEvent):
            seen = open_tables[-1] if open_tables else None
            if seen is not None:
                if key_next[-1] and isinstance(event, yaml.ScalarEvent):
                    if event.value in seen:
                        raise RecipeError(
                            f"{source}: line {event.start_mark.line + 1}: {event.value}: twice. "
                            "Keep one of them."
                        )
                    seen.add(event.value)
                key_next[-1] = not key_next[-1]
            if isinstance(event, yaml.CollectionStartEvent):
                open_tables.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
                key_next.append(True)
        if len(open_tables) > MAX_DEPTH:
            raise RecipeError(f"{source}: nested too deeply. A recipe is flat.")


def _refuse_no_text(source: Path, value: object, where: str = "") -> None:
    """Refuse what no path, name or address may hold: a NUL, and halves of characters."""
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise RecipeError(
            f"{source}: {where}: holds a NUL or half a character but plain text is expected. "
            "Retype it."
        )
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inside in items:
            _refuse_no_text(source, inside, f"{where}.{key}".lstrip("."))


def _problem(kind: type[BaseModel], source: Path, item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(kind, item["loc"][:-1])
        near = did_you_mean(str(item["loc"][-1]), known)
        return f"{source}: {where}: unknown key.{near} Known: {', '.join(known)}."
    if item["type"] == "missing":
        return f"{source}: {where}: missing. Add it."
    # A recipe may hold a pasted secret, so only short plain values are repeated.
    value = item["input"]
    shown = f"{value!r}: " if isinstance(value, int | float | bool) else ""
    return f"{source}: {where}: {shown}{item['msg']}."


def _keys_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Return the known keys of the part at `location`, following nested models and containers."""
    current: Any = kind
    for part in location:
        if part not in current.model_fields:  # a place in a list or table, or one of several types
            continue
        models = list(_models_in(current.model_fields[part].annotation))
        if not models:
            return []
        current = models[0]
    return list(current.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the parts that a field may hold, directly or in a list or table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in typing.get_args(annotation):
        yield from _models_in(inside)
