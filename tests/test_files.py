"""Folders that appear whole or not at all, and manifests that notice every change."""

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from icm_ray import files
from icm_ray.errors import InputError, RecipeError, ResourceError
from icm_ray.files import (
    MANIFEST,
    RUN_FILE,
    check_place,
    errno_of,
    is_done,
    read_json,
    read_manifest,
    refuse_inputs,
    sha256_of,
    sha256_of_file,
    whole_folder,
    write_json,
)


def make(target: Path, text: str = "one", **info: str) -> Path:
    with whole_folder(target, info=info) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text(text)
    return target


def write_and_raise(folder: Path, error: type[BaseException]) -> None:
    (folder / "a.txt").write_text("half")
    raise error


def test_a_folder_holds_its_files_and_a_manifest_of_them(tmp_path: Path) -> None:
    target = make(tmp_path / "new" / "out", key="k")
    manifest = read_manifest(target)
    assert manifest["key"] == "k"
    assert set(manifest["files"]) == {"a.txt", "sub/b.txt"}
    assert manifest["files"]["a.txt"] == sha256_of_file(target / "a.txt")
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("umask", "of_files", "of_folders"), [(0o22, 0o644, 0o755), (0o77, 0o600, 0o700)]
)
def test_files_and_folders_follow_the_umask(
    tmp_path: Path, umask: int, of_files: int, of_folders: int
) -> None:
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "new" / "out") as folder:
            save_file({"x": torch.zeros(1)}, folder / "secretive.safetensors")
            (folder / "sub").mkdir(mode=0o700)
            (folder / "sub" / "open").touch()
            (folder / "sub" / "open").chmod(0o666)
        write_json(tmp_path / "beside.json", {})
    finally:
        os.umask(before)
    made = [tmp_path / "new", *(tmp_path / "new").rglob("*"), tmp_path / "beside.json"]
    assert {p.name: p.stat().st_mode & 0o777 for p in made} == {
        **dict.fromkeys(("new", "out", "sub"), of_folders),
        **dict.fromkeys(("secretive.safetensors", "open", MANIFEST, "beside.json"), of_files),
    }


def test_what_a_link_points_to_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch(mode=0o600)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "link").symlink_to(tmp_path / "theirs")
    assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole_folder(tmp_path / "out") as folder:
        write_and_raise(folder, error)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_folder_survives_a_failed_replacement(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    with pytest.raises(RuntimeError), whole_folder(target) as folder:
        write_and_raise(folder, RuntimeError)
    assert (target / "a.txt").read_text() == "one"
    assert read_manifest(target)
    assert list(tmp_path.iterdir()) == [target]


def test_an_onlooker_finds_a_whole_folder_at_any_moment(tmp_path: Path) -> None:
    target = make(tmp_path / "out", "0" * 100)
    seen, stop = set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            handle = os.open(target, os.O_RDONLY)
            # Relative to the open folder, so a replacement in between cannot mix two of them.
            try:
                names = [os.open(name, os.O_RDONLY, dir_fd=handle) for name in ("a.txt", MANIFEST)]
                seen.add(len(os.read(names[0], 1000)))
                for name in names:
                    os.close(name)
            except FileNotFoundError:
                pass  # the old folder, on its way out
            os.close(handle)

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        for digit in range(1, 20):
            make(target, str(digit % 10) * 100)
        stop.set()
        reader.result()
    assert seen == {100}
    assert (target / "a.txt").read_text() == "9" * 100
    assert list(tmp_path.iterdir()) == [target]


def test_folders_this_project_did_not_make_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files this project did not write"):
        make(foreign)
    # Many other programs call a file of theirs manifest.json.
    for theirs in ('{"name": "web app"}', "[]", "no json", '{"files": ["chapter.tex"]}'):
        (foreign / MANIFEST).write_text(theirs)
        with pytest.raises(InputError, match="holds files this project did not write"):
            make(foreign)
    assert (foreign / "chapter.tex").read_text() == "years of work"


def test_files_a_user_added_to_a_result_are_not_lost(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"did not write \(notes\.txt\)"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "notes.txt").rename(tmp_path / "out" / RUN_FILE)
    make(tmp_path / "out")  # run.json and results.json lie beside the manifest and are ours


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert is_done(make(tmp_path / "out", key="k"), "k")


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "below a file"])
def test_links_and_files_in_the_way_are_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "link":
        target.symlink_to(make(tmp_path / "real"), target_is_directory=True)
    elif kind == "dangling":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.write_text("a file")
    with pytest.raises(InputError, match="is no folder"):
        make(target / "deeper" if kind == "below a file" else target)
    assert target.is_symlink() or target.read_text() == "a file"


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=r"out: could not be written \(No space"),
        whole_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(BrokenPipeError), whole_folder(tmp_path / "out"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_what_was_written_and_what_is_free(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    told = r"after 1000 bytes, \d+ are free\. Free disk space"
    with pytest.raises(ResourceError, match=told), whole_folder(tmp_path / "out") as folder:
        fill(folder)


def test_the_number_of_a_failed_call_is_read_from_every_error_that_has_one() -> None:
    assert errno_of(OSError(errno.EIO, "x")) == errno.EIO
    assert errno_of(SafetensorError("Error while serializing: (os error 28)")) == errno.ENOSPC
    assert errno_of(SafetensorError("no such tensor")) is None
    assert errno_of(ValueError("os error 28")) is None


def test_a_place_is_tried_before_work_and_left_as_it_was(tmp_path: Path) -> None:
    check_place(tmp_path / "a" / "b" / "c")
    check_place(tmp_path / ("n" * 200))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 201, "\u00e9" * 101, f"{'n' * 256}/out", ".."])
def test_a_name_that_no_disk_takes_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="but the path of a folder"):
        check_place(tmp_path / name)
    with pytest.raises(RecipeError, match="output: '/'"):
        check_place(Path("/"))


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, ResourceError), (errno.EROFS, InputError), (errno.EACCES, InputError)],
)
def test_a_place_that_takes_no_folder_is_told_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fail(**_: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.tempfile, "mkdtemp", fail)
    with pytest.raises(kind, match=rf"out: cannot be written \({os.strerror(number)}\)"):
        check_place(tmp_path / "out")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    target = make(tmp_path / "out", key="k")
    assert is_done(target, "k")
    assert not is_done(target, "another")
    content = bytearray((target / "sub" / "b.txt").read_bytes())
    content[0] ^= 1
    (target / "sub" / "b.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"sub/b\.txt: sha256 differs from manifest\.json"):
        read_manifest(target)
    assert not is_done(target, "k")


def test_a_missing_file_is_noticed_and_all_problems_are_told(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    (target / "a.txt").unlink()
    (target / "sub" / "b.txt").write_text("other")
    with pytest.raises(InputError) as caught:
        read_manifest(target)
    assert len(caught.value.problems) == 2
    assert "a.txt: listed in manifest.json but missing" in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside"])
def test_a_manifest_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    target = make(tmp_path / "out")
    (tmp_path / "outside").write_text("x")
    digest = sha256_of_file(tmp_path / "outside")
    write_json(target / MANIFEST, {"files": {name: digest}})
    with pytest.raises(InputError, match="missing"):
        read_manifest(target)


def test_what_carries_a_clock_is_outside_the_manifest(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / RUN_FILE).write_text("{}")
        (folder / "a").write_text("")
    (tmp_path / "out" / RUN_FILE).write_text('{"seconds": 1}')
    assert set(read_manifest(tmp_path / "out")["files"]) == {"a"}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", key="k"), make(tmp_path / "two", key="k")
    assert (one / MANIFEST).read_bytes() == (two / MANIFEST).read_bytes()


def test_json_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_json_is_sorted_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": [1.5]})
    assert path.read_text() == '{\n  "a": [\n    1.5\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [1.5], "b": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{\n\n oops}", r"x\.json: line 3: not JSON"),
        (b"\xff\xfe{}", "not readable as UTF-8 JSON"),
        (b"[" * 200_000, "not readable as UTF-8 JSON"),
        (b"1" * 10_000, "not readable as UTF-8 JSON"),
    ],
)
def test_broken_json_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_json(tmp_path / "x.json")


def test_absent_json_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="Is a directory"):
        read_json(tmp_path)


def test_hashes_of_values_forget_the_order_of_keys() -> None:
    assert sha256_of({"a": 1, "b": [2]}) == sha256_of({"b": [2], "a": 1})
    assert sha256_of({"a": 1}) != sha256_of({"a": 1.5})
    assert sha256_of(1) == files.hashlib.sha256(b"1").hexdigest()
    assert json.loads("1") == 1


def test_an_output_that_is_an_input_is_refused(tmp_path):
    source = tmp_path / "in" / "law"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    inputs = {"adapter 'law'": source}
    for target, relation in (
        (source, "is the adapter 'law'"),
        (tmp_path / "link" / "law", "is the adapter 'law'"),
        (tmp_path / "in" / "x" / ".." / "law", "is the adapter 'law'"),
        (tmp_path / "link", "holds the adapter 'law'"),
        (source / "merged", "lies in the adapter 'law'"),
    ):
        with pytest.raises(InputError, match=relation):
            refuse_inputs(target, inputs)
    refuse_inputs(tmp_path / "in" / "law2", inputs)
    refuse_inputs(tmp_path / "out", inputs)
