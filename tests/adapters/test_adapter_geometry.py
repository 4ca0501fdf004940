"""What files alone say of adapters together, against what dense matrices say."""

from dataclasses import replace

import pytest
import torch
from command_samples import save_lora

from icm_ray.adapters import delta_cosines, geometry, geometry_of, open_all, readings
from icm_ray.adapters.geometry import Geometry, Sides

SHAPES = {"layers.0.q_proj": (24, 16), "layers.1.q_proj": (24, 16)}


def opened(folders):
    return open_all([(folder.name, folder) for folder in folders])


@pytest.fixture
def three(tmp_path):
    return [save_lora(tmp_path / n, i, rank=i + 2, shapes=SHAPES) for i, n in enumerate("abc")]


def test_it_is_what_dense_decompositions_give(three):
    files = opened(three)
    found = geometry_of(files)
    deltas = {f.name: {m: one.delta().double() for m, one in f.stream()} for f in files}
    rows, columns = [], []
    for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
        assert found.cosines[a][b] == pytest.approx(delta_cosines(files)[a][b], abs=1e-6)
        x, y = (torch.cat([deltas[n][m].flatten() for m in sorted(SHAPES)]) for n in (a, b))
        assert found.cosines[a][b] == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-6)
        for module in SHAPES:
            u, v = [], []
            for name in (a, b):
                left, s, right = torch.linalg.svd(deltas[name][module], full_matrices=False)
                rank = int((s > 1e-5 * s[0]).sum())
                u.append(left[:, :rank])
                v.append(right[:rank].T)
            for told, (x, y) in ((columns, u), (rows, v)):
                told.append(float(torch.linalg.svdvals(x.T @ y).square().mean()))
    assert found.rows == pytest.approx(sum(rows) / len(rows), abs=1e-6)
    assert found.columns == pytest.approx(sum(columns) / len(columns), abs=1e-6)
    for file in files:
        shares = []
        for module, factors in file.stream():
            squares = torch.linalg.svdvals(deltas[file.name][module]).square()
            shares.append(float(squares.sum() ** 2 / squares.square().sum()) / factors.rank)
        assert found.used_rank[file.name] == pytest.approx(sum(shares) / len(shares), rel=1e-5)
        norm = sum(float(x.square().sum()) for x in deltas[file.name].values()) ** 0.5
        assert found.norms[file.name] == pytest.approx(norm, rel=1e-5)


def test_one_row_space_is_told(tmp_path):
    files = opened([save_lora(tmp_path / n, 0, shapes=SHAPES) for n in "ab"])
    found = geometry_of(files)
    assert found.rows == pytest.approx(1)
    assert found.columns == pytest.approx(1)
    lines = " ".join(readings(found))
    assert "overlap 1.00: they read alike" in lines
    assert "wudi, which inverts what they read, is undone" in lines
    assert "nearly the same adapter twice" in lines
    assert "column spaces: overlap 1.00" in lines


def test_what_an_election_outvotes_is_what_dense_entries_say(three, monkeypatch):
    monkeypatch.setattr(geometry, "SIGN_ROWS", 24)  # all of them
    files = opened(three)
    sizes, outvoted = 0.0, 0.0
    for module in SHAPES:
        entries = torch.stack([f.factors(module).delta() for f in files])
        positive, negative = entries.clamp(min=0).sum(0), -entries.clamp(max=0).sum(0)
        sizes += float((positive + negative).sum())
        outvoted += float(torch.minimum(positive, negative).sum())
    found = geometry_of(files)
    assert found.outvoted == pytest.approx(outvoted / sizes, rel=1e-4)
    assert found.outvoted_by_chance == pytest.approx(found.outvoted, abs=0.05), "they are unrelated"


def test_adapters_against_each_other_outvote_half(tmp_path):
    [one] = opened([save_lora(tmp_path / "a", 0, shapes=SHAPES)])
    sides = Sides()
    factors = one.factors("layers.0.q_proj")
    sides.add([factors, replace(factors, b=-factors.b)])
    assert sides.smaller / sides.all == pytest.approx(0.5)
    agreeing = Sides()
    agreeing.add([factors, factors])
    assert agreeing.smaller == 0
    assert agreeing.smaller_by_chance / agreeing.all == pytest.approx(0.25, abs=0.05)


def test_words_for_each_trouble():
    found = Geometry(
        cosines={"a": {"a": 1, "b": -0.4}, "b": {"a": -0.4, "b": 1}},
        norms={"a": 1.0, "b": 5.0},
        rows=0.05,
        columns=0.1,
        used_rank={"a": 1.0, "b": 0.4},
        outvoted=0.4,
        outvoted_by_chance=0.3,
    )
    apart, drowned, against, signs, blind = readings(found)
    assert "they read apart" in apart
    assert "a: norm 1 beside 5: it drowns" in drowned
    assert "a and b: cosine -0.40: sums undo part of both" in against
    assert "40% of the entries' size is outvoted, 30% would be by chance: they pull" in signs
    chance, agreed = replace(found, outvoted=0.29), replace(found, outvoted=0.1)
    assert "little better than a coin" in readings(chance)[-2]
    assert "they agree" in readings(agreed)[-2]
    assert "files do not tell: jobs.evidence" in blind


def test_one_adapter_and_modules_that_are_missing(three, tmp_path):
    alone = geometry_of(opened(three[:1]))
    assert (alone.rows, alone.columns, readings(alone)) == (None, None, [])
    other = save_lora(tmp_path / "d", 5, shapes={"layers.2.q_proj": (24, 16)})
    found = geometry_of(opened([*three[:1], other]))
    assert found.cosines["a"]["d"] == 0
    assert found.rows is None
