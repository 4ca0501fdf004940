"""Where workers find the base: each maps it from its folder, on its own node and device."""

import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from icm_ray.adapters.base_folder import open_base
from icm_ray.base_model.loading import (
    Base,
    build_base,
    fingerprint_weights,
    load_weights,
    stored_dtype,
)
from icm_ray.base_model.placing import Place
from icm_ray.errors import InputError

Prepare = Callable[[], Path]
"""Makes the base's folder on a node that has not got it, as the driver's was made."""


@dataclass(frozen=True)
class SharedBase:
    """What any worker needs to map the base on its node; the weights themselves never travel.

    Attributes:
        path: The base's folder, as the driver found it.
        fingerprint: sha256 of the weights.
        dtype: Precision of the weights, as torch calls it.
        bytes: Size of the weights.
        prepare: Makes the folder where a node lacks it; None: it must be there.
    """

    path: Path
    fingerprint: str
    dtype: str
    bytes: int
    prepare: Prepare | None = None

    def load(self, place: Place) -> Base:
        """Return the base inside a worker, mapped from the node's own folder.

        Args:
            place: Where the model goes.

        Raises:
            InputError: the node has no such folder, or holds another base in it.
        """
        # A deprecation inside transformers that its own models trigger; nothing a user can act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        node, is_there = socket.gethostname(), self.path.is_dir()
        path = self.prepare() if self.prepare and not is_there else self.path
        if not path.is_dir():
            raise InputError(
                f"{path}: not on node {node} but every node maps the base from this folder. Put "
                "it on storage that all nodes see, or name it by its hub id."
            )
        weights = load_weights(path, is_known=True)
        if not is_there and fingerprint_weights(weights) != self.fingerprint:
            raise InputError(
                f"{path}: another base on node {node} than the driver's. Name a revision, or put "
                "the base on storage that all nodes see."
            )
        return build_base(path, weights, place)


def share_base(path: Path, prepare: Prepare | None = None) -> SharedBase:
    """Look at a base's weights once; see `SharedBase`.

    Raises:
        InputError: as `load_weights`.
    """
    weights = load_weights(path)
    return SharedBase(
        path=path,
        fingerprint=fingerprint_weights(weights),
        dtype=str(stored_dtype(open_base(path))).removeprefix("torch."),
        bytes=sum(tensor.nbytes for tensor in weights.values()),
        prepare=prepare,
    )
