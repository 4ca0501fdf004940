"""`adapter_model.bin`, for those who allow it by name: converted once, then read like any other."""

import shutil
import subprocess
import sys
from pathlib import Path

from icm_ray.adapters.formats.finding import PICKLE_FILE
from icm_ray.adapters.formats.peft import INDEX_FILE, WEIGHTS_FILE
from icm_ray.adapters.policy import CONFIG_FILE
from icm_ray.adapters.raw_files import regular_size
from icm_ray.errors import InputError, ResourceError
from icm_ray.files import is_done, sha256_of, sha256_of_file, whole_folder

CONVERSION_SECONDS = 600.0
SCRIPT = Path(__file__).with_name("unpickle.py")


def unpickled(folder: Path, cache: Path) -> Path:
    """Return `folder`, or its copy as safetensors if its weights are pickled only.

    The pickle is read by torch's weights-only loader in a process of its own.

    Args:
        folder: An adapter's folder.
        cache: Where the copy is kept, under the hash of what it was made from.

    Raises:
        InputError: the pickle holds anything but tensors, or has no config beside it.
        ResourceError: it took too long.
    """
    pickle = folder / PICKLE_FILE
    if not pickle.is_file() or any((folder / n).exists() for n in (WEIGHTS_FILE, INDEX_FILE)):
        return folder
    config = folder / CONFIG_FILE
    regular_size(config)
    key = sha256_of([sha256_of_file(pickle), sha256_of_file(config)])
    target = cache / "adapters" / key[:32]
    if not is_done(target, key):
        with whole_folder(target, info={"key": key}) as copy:
            _convert(pickle, copy / WEIGHTS_FILE)
            shutil.copyfile(config, copy / CONFIG_FILE)
    return target


def _convert(pickle: Path, target: Path) -> None:
    command = [sys.executable, "-I", str(SCRIPT), str(pickle.absolute()), str(target.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERSION_SECONDS)
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"{pickle}: not read after {CONVERSION_SECONDS:.0f} s but its weights were expected by "
            "then. Convert it to safetensors with PEFT."
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(
            f"{pickle}: not read ({reason}) but a pickle of tensors alone is expected. "
            "Convert it to safetensors with PEFT, where you trust it."
        )
