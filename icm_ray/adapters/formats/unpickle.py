"""Run as a script, in a process of its own: the tensors of a pickle, saved as safetensors.

    python -I unpickle.py adapter_model.bin adapter_model.safetensors

It imports nothing of this package, so that what it needs is all that a hostile file can reach.
"""

import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SPARE_BYTES = 2**30


def read_tensors(source: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of `source`, a dictionary of nothing but tensors.

    Raises:
        ValueError: it holds something else, or tensors larger than the file itself.
    """
    tensors = torch.load(source, map_location="cpu", weights_only=True)
    plain = isinstance(tensors, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in tensors.items()
    )
    if not plain:
        raise ValueError("something else than a dictionary of dense tensors")
    if sum(value.nbytes for value in tensors.values()) > source.stat().st_size:
        raise ValueError("tensors larger than the file")
    return {key: value.detach().contiguous().clone() for key, value in tensors.items()}


def _limit_memory(more: int) -> None:
    """Let this process take `more` bytes of address space than it has now, where that is known."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + more, held + more))


if __name__ == "__main__":
    try:
        pickle = Path(sys.argv[1])
        _limit_memory(4 * pickle.stat().st_size + SPARE_BYTES)
        save_file(read_tensors(pickle), sys.argv[2])
    except Exception as error:
        # The first sentence; torch's advice to load without its guard is none.
        sys.exit(f"{type(error).__name__}: {error}".partition(". ")[0].splitlines()[0])
