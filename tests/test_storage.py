"""Outputs at an address: fetched before, uploaded after, manifests last."""

import threading
from pathlib import Path

import pytest
import yaml

from icm_ray import storage
from icm_ray.command import run_recipe
from icm_ray.config import PrepareRecipe
from icm_ray.errors import ClusterError, InputError, RecipeError, ResourceError
from icm_ray.files import MANIFEST, read_manifest, whole_folder
from icm_ray.locks import Holder
from icm_ray.owners import Owner
from icm_ray.storage import (
    STORAGE_VARIABLE,
    SUBMITTED_JOB_VARIABLE,
    fetch,
    held,
    locate,
    publish,
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    monkeypatch.delenv(SUBMITTED_JOB_VARIABLE, raising=False)
    monkeypatch.setenv("ICM_RAY_CACHE", str(tmp_path / "cache"))


def test_a_folder_is_its_own_place(tmp_path: Path) -> None:
    place, address = locate(PrepareRecipe(storage=str(tmp_path), output="out"))
    assert (place, address) == (tmp_path / "out", None)


def test_an_address_is_worked_on_in_the_cache(tmp_path: Path) -> None:
    recipe = PrepareRecipe(storage="s3://bucket/runs/", output="out")
    place, address = locate(recipe)
    assert address == "s3://bucket/runs/out"
    assert place.name == "out"
    assert place.is_relative_to(tmp_path / "cache")
    assert locate(recipe) == (place, address)
    assert locate(PrepareRecipe(output="s3://other/out"))[0] != place


def test_an_address_is_no_relative_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUBMITTED_JOB_VARIABLE, "{}")
    assert locate(PrepareRecipe(storage="gs://bucket", output="out"))[1] == "gs://bucket/out"
    with pytest.raises(RecipeError, match="is relative"):
        locate(PrepareRecipe(output="out"))


def test_options_of_an_address_stay_at_its_end() -> None:
    """As endpoint_override of a store that is not Amazon's."""
    recipe = PrepareRecipe(storage="s3://bucket/runs?region=x&scheme=http", output="out")
    place, address = locate(recipe)
    assert address == "s3://bucket/runs/out?region=x&scheme=http"
    assert place.name == "out"


def test_what_was_published_is_fetched_back(tmp_path: Path) -> None:
    address = (tmp_path / "remote" / "out").as_uri()
    with whole_folder(tmp_path / "one", info={"key": "k"}) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text("a")
    publish(tmp_path / "one", address)
    fetch(address, tmp_path / "two")
    assert read_manifest(tmp_path / "two") == read_manifest(tmp_path / "one")
    assert (tmp_path / "two" / "inner" / "a.txt").read_text() == "a"


def test_manifests_come_last(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "one") as folder:
        (folder / "z.txt").write_text("z")
    # A file where a folder must go: the upload of z.txt fails, so no manifest may be there.
    remote = tmp_path / "remote"
    (remote / "z.txt").mkdir(parents=True)
    with pytest.raises(ClusterError, match=r"z\.txt could not be copied"):
        publish(tmp_path / "one", remote.as_uri())
    assert not (remote / MANIFEST).exists()


def test_nothing_there_is_fine(tmp_path: Path) -> None:
    fetch((tmp_path / "none").as_uri(), tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_bad_address_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="a nonsense:// address") as caught:
        publish(tmp_path, "nonsense://user:hunter2@host/x")
    assert "hunter2" not in str(caught.value)


def no_work(_recipe: PrepareRecipe, _target: Path) -> dict[str, object]:
    pytest.fail("the body must not run")


def test_a_run_holds_its_address_and_another_machine_s_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "BEAT_SECONDS", 0.05)
    address, lock = (tmp_path / "remote" / "out").as_uri(), tmp_path / "remote" / "out.lock"
    with held(address):
        holder = Holder.read(lock.read_bytes())
        assert holder is not None
        assert holder.owner == Owner.me()
        with pytest.raises(InputError, match=f"{address}: held by another run"), held(address):
            pass
    assert list(lock.parent.iterdir()) == []

    theirs = Holder(Owner("node-7", "f" * 36, "0" * 8, 77, 1), "2026-01-02T03:04:05Z")
    lock.write_bytes(theirs.written(0))
    monkeypatch.setattr(storage, "BEAT_SECONDS", 1.0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"storage": lock.parent.as_uri(), "output": "out"}))
    ended = threading.Event()

    def beat() -> None:  # until it was heard: the run may be slow to listen
        number = 0
        while not ended.wait(0.05):
            number += 1
            lock.write_bytes(theirs.written(number))

    beats = threading.Thread(target=beat)
    beats.start()
    assert run_recipe(PrepareRecipe, no_work, recipe, [], debug=False) == 3
    ended.set()
    beats.join()
    assert "out: held by another run (pid 77 on node-7" in capsys.readouterr().err
    assert [path.name for path in lock.parent.iterdir()] == ["out.lock"]
    monkeypatch.setattr(storage, "BEAT_SECONDS", 0.05)
    with pytest.warns(UserWarning, match="pid 77 on node-7.* is broken"), held(address):
        pass


def test_a_lock_that_cannot_be_written_is_a_fault_of_the_storage(tmp_path: Path) -> None:
    (tmp_path / "out.lock").mkdir()
    with (
        pytest.raises(ClusterError, match="storage: the lock could not be copied"),
        held((tmp_path / "out").as_uri()),
    ):
        pass
