"""Recipes of other tools, turned into merge recipes: mergekit's YAML and PEFT's merge call.

Nothing of a file is ever executed: YAML is read by `safe_load`, Python by its syntax tree alone.
"""

from pathlib import Path

from icm_ray.config.loading import MAX_RECIPE_BYTES
from icm_ray.errors import RecipeError
from icm_ray.importing.mergekit import read_mergekit
from icm_ray.importing.peft_call import read_peft_call
from icm_ray.importing.writing import Imported, checked, recipe_text, write_recipe

__all__ = ["Imported", "import_recipe", "recipe_text", "write_recipe"]


def import_recipe(source: str | Path) -> Imported:
    """Read another tool's recipe and say it in our words.

    Args:
        source: A mergekit YAML file whose models are `base+adapter`, or a Python file with one
            call of PEFT's `add_weighted_adapter`; at most 1 MB.

    Returns:
        The recipe, which `load_recipe` and the method accept, and what to know about it.

    Raises:
        RecipeError: everything that cannot be carried over, one line each.
    """
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file. Give a mergekit YAML or a Python file.")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: over {MAX_RECIPE_BYTES} bytes. A recipe is a short text.")
    if path.suffix.lower() in (".yaml", ".yml"):
        return checked(read_mergekit(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8. Save it as UTF-8.") from None
    if path.suffix == ".py" or "add_weighted_adapter" in text:
        return checked(read_peft_call(path, text))
    return checked(read_mergekit(path))
