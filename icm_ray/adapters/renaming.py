"""Module names that transformers changed, and still reads as the new ones.

An adapter names its modules as the release it was trained with did. Two adapters of one base may
so adapt the same layers under two names; only the renamings of transformers' own conversion tables
are followed here, and only towards names that another adapter of the merge has.
"""

import re
from collections.abc import Iterable, Mapping

FAMILIES: tuple[tuple[tuple[str, str], ...], ...] = (
    # LLaVA and its kin (Gemma 3, PaliGemma, Mistral 3, InternVL, Mllama, Qwen2-Audio), before 4.52.
    (
        (r"language_model\.model\.", "model.language_model."),
        (r"language_model\.lm_head\b", "lm_head"),
        (
            r"((vision|image|video|audio)_tower|vision_model|multi_modal_projector)\.",
            r"model.\1.",
        ),
        (r"model\.language_model\.model\.", "model.language_model."),
    ),
    # Qwen2-VL and its kin before 4.52, and text-only classes of a vision-language base.
    (
        (r"model\.(?=(embed_tokens|layers|norm)\b)", "model.language_model."),
        (r"visual\.", "model.visual."),
    ),
    # Towers of CLIP and SigLIP on their own, before 5.
    ((r"(vision|text)_model\.", ""),),
)
"""Rules (beginning of a name, what it became) by family; the first rule that fits counts."""


def renamings(adapters: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """Return how adapters' module names must change for equal modules to have equal names.

    Args:
        adapters: Module paths by adapter.

    Returns:
        `{adapter: {its path: new path}}`, only of adapters and paths that change.
    """
    old = {name: frozenset(modules) for name, modules in adapters.items()}
    for family in FAMILIES:
        changed = {modules: changed_names(modules, family) for modules in set(old.values())}
        new = {name: names for name, modules in old.items() if (names := changed[modules])}
        if any(
            _meets(names, old[name], old[other]) for name, names in new.items() for other in old
        ):
            return new
    return {}


def changed_names(modules: Iterable[str], family: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Return the paths that a family's rules change, and what to; none if two became one."""
    paths = frozenset(modules)
    names = {path: new for path in paths if (new := _renamed(path, family)) != path}
    is_unique = len(set(names.values()) - paths) == len(names)
    return names if is_unique else {}


def _renamed(path: str, family: tuple[tuple[str, str], ...]) -> str:
    for beginning, new in family:
        if match := re.match(beginning, path):
            return match.expand(new) + path[match.end() :]
    return path


def _meets(names: Mapping[str, str], own: frozenset[str], other: frozenset[str]) -> bool:
    """Say whether more modules are shared with another adapter under the new names."""
    return len({names.get(path, path) for path in own} & other) > len(own & other)
