"""Every worker maps the base from its node's folder; the weights never travel."""

import pickle
from dataclasses import replace

import pytest

from icm_ray.base_model.loading import fingerprint_weights
from icm_ray.base_model.placing import HERE
from icm_ray.base_model.shared_base import share_base
from icm_ray.errors import InputError


def test_a_node_without_the_folder_makes_it_as_the_driver_did(tiny_bert, tmp_path) -> None:
    shared = share_base(tiny_bert, lambda: tiny_bert)
    elsewhere = replace(shared, path=tmp_path / "of another node")
    base = elsewhere.load(HERE)
    assert fingerprint_weights(base.weights()) == shared.fingerprint
    with pytest.raises(InputError, match=r"another base on node .* Name a revision"):
        replace(elsewhere, fingerprint="0").load(HERE)
    with pytest.raises(InputError, match=r"of another node: not on node .* storage that all nodes"):
        replace(elsewhere, prepare=None).load(HERE)


def test_the_base_itself_never_travels(tiny_bert) -> None:
    assert len(pickle.dumps(share_base(tiny_bert))) < 2_000
