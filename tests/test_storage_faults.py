"""Storage that fails, cuts and spoils: whole bytes in the end, or exit 5 and how to go on."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_samples import recipe_of, save_lora
from s3_server import Store, s3_server
from typer.testing import CliRunner

from icm_ray.cli import app
from icm_ray.errors import ClusterError
from icm_ray.files import MANIFEST, read_manifest, whole_folder
from icm_ray.storage import MAX_FETCHES, fetch, publish

PLACE = "bucket/runs/out"
PATIENCE = 60
"""Seconds; an answer of 503 is asked for again a few times, longer and longer apart."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("ICM_RAY_CACHE", str(tmp_path / "cache"))
    with s3_server() as store:
        yield store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished folder of two files."""
    with whole_folder(tmp_path / "one", info={"key": "k"}) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text("a" * 100)
        (folder / "z.bin").write_bytes(bytes(range(256)))
    return tmp_path / "one"


def bodies(*kinds: str):
    """Return a fault: the first answers with the content of z.bin are of these kinds."""
    rest = list(kinds)

    def fault(method: str, name: str) -> str | None:
        return rest.pop(0) if method == "BODY" and name.endswith("z.bin") and rest else None

    return fault


def every_third() -> object:
    calls = iter(range(10**9))
    return lambda method, _name: "503" if method != "BODY" and next(calls) % 3 == 2 else None


def test_every_third_call_may_fail(store: Store, folder: Path, tmp_path: Path) -> None:
    store.fault = every_third()  # type: ignore[assignment]
    publish(folder, store.uri(PLACE))
    fetch(store.uri(PLACE), tmp_path / "two")
    assert read_manifest(tmp_path / "two") == read_manifest(folder)


@pytest.mark.parametrize("kind", ["cut", "spoilt"])
def test_what_a_transfer_has_changed_is_fetched_again(
    store: Store, folder: Path, tmp_path: Path, kind: str
) -> None:
    publish(folder, store.uri(PLACE))
    store.fault = bodies(kind, kind)
    fetch(store.uri(PLACE), tmp_path / "two")
    assert read_manifest(tmp_path / "two") == read_manifest(folder)


def test_what_stays_spoilt_is_left_out_and_said(
    store: Store, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an upload that was killed halfway leaves it: the old manifest beside new files."""
    publish(folder, store.uri(PLACE))
    store.objects[f"{PLACE}/z.bin"] = b"newer"
    fetch(store.uri(PLACE), tmp_path / "two")
    assert not (tmp_path / "two").exists()
    assert caplog.messages == ["two: not whole at its address, so it is made again."]
    assert store.calls.count(("GET", f"{PLACE}/{MANIFEST}")) == MAX_FETCHES


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("kind", ["503", "cut"])
def test_storage_that_never_recovers_is_said_in_time(
    store: Store, folder: Path, tmp_path: Path, kind: str
) -> None:
    publish(folder, store.uri(PLACE))
    store.fault = lambda method, _name: kind if (method == "BODY") == (kind == "cut") else None
    with pytest.raises(ClusterError, match="run the same command again once the storage") as error:
        fetch(store.uri(PLACE), tmp_path / "two")
    assert "secret" not in str(error.value)


@pytest.mark.slow
def test_a_manifest_is_never_there_before_its_files(store: Store, folder: Path) -> None:
    store.fault = lambda method, name: "503" if method != "BODY" and "z.bin" in name else None
    with pytest.raises(ClusterError, match=r"z\.bin could not be copied"):
        publish(folder, store.uri(PLACE))
    assert f"{PLACE}/{MANIFEST}" not in store.objects


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
def test_a_job_ends_with_five_and_goes_on_from_its_cache(store: Store, tmp_path: Path) -> None:
    """The merge is made; only its upload fails, so the next run has nothing but that to do."""
    folders = {name: save_lora(tmp_path / name, seed) for seed, name in enumerate("ab")}
    recipe = recipe_of(
        tmp_path / "r.yaml", folders, output={"path": "out"}, storage=store.uri("bucket/runs")
    )
    store.fault = lambda method, _name: "503" if method in ("POST", "PUT") else None
    started = time.monotonic()
    done = CliRunner().invoke(app, ["merge", "-c", str(recipe)])
    assert done.exit_code == 5, done.output
    assert time.monotonic() - started < PATIENCE
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines
    assert all("run the same command again" in line for line in lines)
    assert "secret" not in done.output
    store.fault = lambda _method, _name: None
    done = CliRunner().invoke(app, ["merge", "-c", str(recipe)])
    assert done.exit_code == 0, done.output
    fetch(store.uri(PLACE), tmp_path / "back")
    read_manifest(tmp_path / "back")
