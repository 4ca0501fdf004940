"""The Python on a model card: it runs as it stands, and loads all that the adapter changes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from icm_ray.report.text import markdown

FOLDER = "PATH_TO_THIS_FOLDER"
BASE = "BASE_MODEL"
BARE = "AutoModel"
WITH_LABELS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")
"""The last layer of a classifier; it has a row for each label."""
EMBEDDINGS = (".embed_tokens.weight", ".lm_head.weight")
"""Layers with a row for each token of a vocabulary that may have grown."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of full tensors by their path in the base model."""


@dataclass(frozen=True)
class Usage:
    """What must be known to load a merged adapter.

    Attributes:
        classes: The class of transformers that each task's adapter was trained on, where known.
        kept: Full layers of each task that lie beside the adapter.
        inside: Full layers inside the adapter, which PEFT loads itself.
    """

    classes: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, Shapes] = field(default_factory=dict)
    inside: Shapes = field(default_factory=dict)


def how_to_load(usage: Usage, base: str | None) -> str:
    """Return the section of a model card that loads the adapter.

    Args:
        usage: Classes and full layers.
        base: Hub id of the base, or None for a placeholder.
    """
    task = next(iter(sorted(usage.kept)), next(iter(sorted(usage.classes)), ""))
    kind = usage.classes.get(task, BARE)
    layers = usage.kept.get(task, usage.inside)
    labels = _rows(layers, HEADS) if kind in WITH_LABELS else None
    # The head below takes the place of whatever head the base has.
    options = f", num_labels={labels}, ignore_mismatched_sizes=True" if labels else ""
    reads_head = task in usage.kept
    code = [
        "import warnings\n",
        "from peft import PeftModel",
        *(["from safetensors.torch import load_file"] if reads_head else []),
        f"from transformers import {kind}\n",
        "# An adapter that does not fit the base is an error, not a warning.",
        'warnings.filterwarnings("error", message=".*missing adapter keys")',
        *_other_classes(usage, kind),
        f"base = {kind}.from_pretrained({json.dumps(base or BASE)}{options})",
    ]
    if tokens := _rows(layers, EMBEDDINGS):
        code.append(f"base.resize_token_embeddings({tokens})")
    code.append(f'folder = "{FOLDER}"')
    if reads_head:
        file = json.dumps(f"/saved_modules/{task}.safetensors", ensure_ascii=False)
        code += [
            f"layers = load_file(folder + {file})",
            "unknown = base.load_state_dict(layers, strict=False).unexpected_keys",
            "assert not unknown, unknown",
        ]
    code.append("model = PeftModel.from_pretrained(base, folder)")
    return "\n".join(["## Use\n", "```python", *code, "```\n", _layers_text(usage)])


def _other_classes(usage: Usage, kind: str) -> list[str]:
    """Return comments on tasks whose adapters were trained on another class."""
    users: dict[str, int] = {}
    for other in usage.classes.values():
        users[other] = users.get(other, 0) + (other != kind)
    return [f"# {other} for {n} of the adapters' tasks." for other, n in sorted(users.items()) if n]


def _layers_text(usage: Usage) -> str:
    if usage.inside:
        return (
            f"The average of {len(usage.inside)} whole layers (`modules_to_save`) is in this "
            "folder; PEFT loads it with the adapter.\n"
        )
    if not usage.kept:
        return ""
    lines = [
        f"- `saved_modules/{markdown(task)}.safetensors`: {len(layers)} tensors"
        for task, layers in sorted(usage.kept.items())
    ]
    return "\n".join(
        [
            "## Whole layers beside the merge\n",
            "Layers that `modules_to_save` trained are not merged. Each task's own are kept; load "
            "them over the base for that task, as above:\n",
            *lines,
            "",
        ]
    )


def _rows(layers: Shapes, endings: tuple[str, ...]) -> int | None:
    """Return the rows of the first layer whose path ends so."""
    found = (shape[0] for path, shape in layers.items() if f".{path}".endswith(endings))
    return next(found, None)
