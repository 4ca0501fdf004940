"""Heads that PEFT trained with an adapter, and whether a base's classifiers read as we do."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from icm_ray.adapters import open_adapter
from icm_ray.adapters.base_folder import open_base
from icm_ray.adapters.base_skeleton import is_language_model, missing_weights
from icm_ray.base_model.states import POOLERS
from icm_ray.errors import InputError
from icm_ray.evaluation.heads import Bend, Head

LAST_TOKEN = "score"
"""The layer of decoders' sequence classifiers, which read the last token."""
DENSE: Mapping[str, tuple[str, Bend]] = {
    "classifier.dense": ("classifier.out_proj", "tanh"),  # RoBERTa and its kin
    "pre_classifier": ("classifier", "relu"),  # DistilBERT
}
"""Layers before the last one of some classifiers, which read the first token."""
KNOWN = {
    "classifier": (*POOLERS, "vit", "deit"),
    "classifier.dense": ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text"),
    "pre_classifier": ("distilbert",),
}
"""Kinds of models whose classifiers are made of these layers, and of nothing besides."""


def head_in(adapter: Path) -> Head | None:
    """Return the `score` or `classifier` that an adapter carries among its full layers, if one."""
    file = open_adapter(adapter, saved_modules="keep")
    names = set(file.saved_names)
    if not any(name.startswith(("score.", "classifier.", "pre_classifier.")) for name in names):
        return None
    return _head(file.whole_layers())


def _head(layers: Mapping[str, Tensor]) -> Head | None:
    plain = {name: tensor.float() for name, tensor in layers.items()}
    if f"{LAST_TOKEN}.weight" in plain:
        return Head(*_layer(plain, LAST_TOKEN), pooling="last")
    for dense, (last, bend) in DENSE.items():
        if f"{dense}.weight" in plain and f"{last}.weight" in plain:
            inner = _layer(plain, dense)
            return Head(*_layer(plain, last), pooling="first", dense=inner, bend=bend)
    return (
        Head(*_layer(plain, "classifier"), pooling="own") if "classifier.weight" in plain else None
    )


def _layer(layers: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    weight = layers[f"{name}.weight"]
    return weight, layers.get(f"{name}.bias", weight.new_zeros(len(weight)))


def misfits(heads: Mapping[str, Head | None], base: Path) -> list[str]:
    """Return a line for each task's head that this base's classifiers would not read so.

    A None asks the base itself for the names of the classes, which only a language model can say.
    """
    folder = open_base(base)
    kind, lines = folder.config.model_type, []
    writes = is_language_model(folder.config)
    absent = missing_weights(folder) if any(_reads_own(head) for head in heads.values()) else []
    for task, head in heads.items():
        if head is None and not writes:
            lines.append(f"{task}: no head, and {base.name} is no language model. Give a head.")
        if head is None or head.pooling in ("mean", "last"):
            continue
        layer = _layer_name(head)
        if kind not in KNOWN[layer]:
            lines.append(
                f"{task}: a head of {layer} on {kind} but {', '.join(KNOWN[layer])} are read. Save "
                "one linear layer as head.safetensors beside the adapter."
            )
        elif kind in POOLERS and layer == "classifier" and _lacks_pooler(absent):
            lines.append(
                f"{task}: a head that reads the base's pooler, which {base.name} lacks. Name the "
                "base that the adapter was trained on."
            )
    return lines


def _layer_name(head: Head) -> str:
    if head.pooling == "own":
        return "classifier"
    return "classifier.dense" if head.bend == "tanh" else "pre_classifier"


def _reads_own(head: Head | None) -> bool:
    return head is not None and head.pooling == "own"


def _lacks_pooler(absent: Sequence[str]) -> bool:
    return any("pooler" in name for name in absent)


def check_heads(heads: Mapping[str, Head | None], base: Path) -> None:
    """Raise InputError naming every head that cannot be read on a base."""
    if heads and (lines := misfits(heads, base)):
        raise InputError([f"heads: {line}" for line in lines])
