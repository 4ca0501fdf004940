"""Random draws that depend on what is drawn and never on who draws it.

A draw is keyed by (seed, task, module, ...), so any number of workers, in any order, makes the
same numbers.
"""

import hashlib

import torch


def seed_for(*key: object) -> int:
    """Return a 63-bit seed for `key`, the same on every machine and Python version."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator seeded by `key`, for example `generator(seed, task, module)`."""
    return torch.Generator().manual_seed(seed_for(*key))
