"""What a base's files call the weights of the model that transformers makes of them.

A checkpoint of an older release has other names, and mixtures of experts are stored expert by
expert where the model has one parameter. transformers' own conversion tables say which is which.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """What a weight of the model is made of.

    Attributes:
        keys: The stored tensors; several where they are put together. Those of one part stand
            beside each other, its experts in their order.
        parts: How many parts lie one below the other in each expert's matrix.
        piece: Which of how many equal pieces of the one tensor's rows it is; None for all.
        is_turned: Whether each matrix in it is the transpose of the weight's.
        operation: What else is done to them when they are loaded, in words; nothing else if empty.
    """

    keys: tuple[str, ...]
    parts: int = 1
    piece: tuple[int, int] | None = None
    is_turned: bool = False
    operation: str = ""

    def of_expert(self, expert: int) -> list[str]:
        """Return the stored tensors of one expert, from top to bottom."""
        count = len(self.keys) // self.parts
        return [self.keys[part * count + expert] for part in range(self.parts)]


def sources_of(model: Any, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """Return the source of each weight of a model that some of the stored tensors make.

    Args:
        model: A model of transformers; its weights may be absent.
        stored: Shapes of the tensors in the files, by name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    weights, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, weights)
        if name not in weights and key in weights:
            name, pattern = rename_source_key(key, [], [], prefix, weights)
        found.setdefault(name, {}).setdefault(pattern, []).append(key)
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    sources: dict[str, Source] = {}
    for name, patterns in found.items():
        converter = next((by_pattern[pattern] for pattern in patterns if pattern), None)
        if converter is None:
            sources[name] = Source(tuple(key for keys in patterns.values() for key in keys))
        else:
            sources |= _turned(name, patterns, converter, stored, weights) or _converted(
                name, patterns, converter
            )
    return {name: source for name, source in sources.items() if name in weights}


def _turned(
    name: str,
    patterns: Mapping[str | None, list[str]],
    converter: Any,
    stored: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Any],
) -> dict[str, Source]:
    """Return the source of a stack of matrices that some files hold turned; else nothing."""
    keys = tuple(key for part in patterns.values() for key in part)
    steps = [(type(one).__name__, vars(one)) for one in converter.operations]
    swap = {"dim0": 1, "dim1": 2, "check_dims": True}
    if steps != [("Transpose", swap)] or len(keys) != 1 or name not in weights:
        return {}
    return {name: Source(keys, is_turned=stored[keys[0]] != tuple(weights[name].shape))}


def _converted(
    name: str, patterns: Mapping[str | None, list[str]], converter: Any
) -> dict[str, Source]:
    """Return the sources of the weights that one converter makes, the first of which is `name`."""
    parts = [patterns[pattern] for pattern in converter.source_patterns if pattern in patterns]
    keys = tuple(key for part in parts for key in part)
    steps = [(type(one).__name__, getattr(one, "dim", None)) for one in converter.operations]
    targets = converter.target_patterns
    names = [name.replace(targets[0], target, 1) for target in targets]
    if steps == [("Chunk", 0)] and len(keys) == 1:
        return {n: Source(keys, piece=(i, len(names))) for i, n in enumerate(names)}
    is_list = steps[:1] == [("MergeModulelist", 0)] and steps[1:] in ([], [("Concatenate", 1)])
    if is_list and len({len(part) for part in parts}) == 1 and len(targets) == 1:
        return {name: Source(keys, len(parts))}
    operation = " and ".join(step for step, _ in steps)
    return {one: Source(keys, operation=operation) for one in names}
