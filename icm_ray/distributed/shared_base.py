"""One copy of the base a node: weights in the object store, small files beside them."""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.base_model.loading import Base, build_base, fingerprint_weights, load_weights
from icm_ray.config import Resources

SMALL_FILE = 20_000_000


@dataclass(frozen=True)
class SharedBase:
    """References that any worker can rebuild the base from, on any node.

    Attributes:
        weights: ObjectRef of `{name: float32 array}`; numpy, because Ray maps numpy arrays into
            every process without a copy and torch tensors it copies.
        files: ObjectRef of the config and tokenizer files by name, so that nodes need no shared
            disk for the base.
        fingerprint: sha256 of the weights.
        bytes: Size of the weights.
    """

    weights: Any
    files: Any
    fingerprint: str
    bytes: int


def share_base(path: Path) -> SharedBase:
    """Put a base's weights into the object store once."""
    import ray

    weights = load_weights(path)
    files = {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.suffix in (".json", ".txt", ".model") and file.stat().st_size < SMALL_FILE
    }
    size = sum(array.nbytes for array in weights.values())
    return SharedBase(ray.put(weights), ray.put(files), fingerprint_weights(weights), size)


def rebuild(shared: SharedBase, resources: Resources) -> Base:
    """Return the base inside a worker, around the weights every process of the node shares."""
    import ray

    weights, files = ray.get([shared.weights, shared.files])
    # A deprecation inside transformers that its own models trigger; nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    with tempfile.TemporaryDirectory(prefix="icm_ray-base-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return build_base(Path(folder), weights, device=resources.device, dtype=resources.dtype)
