"""A clock that goes back, and files that are all of one age, change nothing."""

import os
import time

import pytest
from command_samples import recipe_of, save_lora
from ray_samples import hashes

from icm_ray.files import is_done, read_manifest, whole_folder


@pytest.fixture
def backwards(monkeypatch):
    """Each look at the clock is an hour before the last one."""
    hours = iter(range(10**6))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    monkeypatch.setattr(time, "gmtime", lambda *_: time.struct_time((1970, 1, 1, 0, 0, 0, 3, 1, 0)))


def test_a_merge_while_the_clock_goes_back_is_the_same(cli, tmp_path, request):
    folders = {name: save_lora(tmp_path / name, seed) for seed, name in enumerate("ab")}
    recipe = recipe_of(tmp_path / "r.yaml", folders)
    assert cli("merge", "-c", recipe)[0] == 0
    expected = hashes(tmp_path / "merged")
    request.getfixturevalue("backwards")
    assert cli("merge", "-c", recipe)[0] == 0
    assert hashes(tmp_path / "merged") == expected
    assert cli("reproduce", tmp_path / "merged")[0] == 0


@pytest.mark.parametrize("age", [0, 4_000_000_000])
def test_what_is_done_is_told_by_its_content_and_not_by_its_age(tmp_path, age):
    with whole_folder(tmp_path / "one", info={"key": "k"}) as folder:
        (folder / "a.txt").write_text("a")
    for path in (tmp_path / "one").iterdir():
        os.utime(path, (age, age))
    assert is_done(tmp_path / "one", "k")
    os.utime(tmp_path / "one", (age, age))
    with whole_folder(tmp_path / "one", info={"key": "new"}) as folder:
        (folder / "a.txt").write_text("b")
    assert read_manifest(tmp_path / "one")["key"] == "new"
    assert not is_done(tmp_path / "one", "k")
