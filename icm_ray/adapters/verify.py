"""Proof that a written folder holds the change it should: read again, and compared."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from icm_ray.adapters.peft_format import AdapterFile, open_adapter
from icm_ray.errors import InputError
from icm_ray.types import Adapter

TOLERANCES = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
"""Relative error that rounding the two factors to the file's element type may cause."""
PROBES = 4


def verify_written(folder: str | Path, expected: Adapter) -> dict[str, float]:
    """Read `folder` and compare every module's output on random inputs.

    By our own reader, since PEFT takes several times as long to import as torch does; see
    `verify_with_peft`.

    Args:
        folder: A PEFT adapter folder.
        expected: The change it should hold; modules of rank 0 may be absent.

    Returns:
        `modules`, their number, and `max_relative_error` over random inputs.

    Raises:
        InputError: naming every module that is missing, unexpected or different.
    """
    file, wanted = reopened(folder, expected)
    errors = {}
    for seed, (module, found) in enumerate(file.stream(wanted)):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(PROBES, found.shape[1], generator=draw)
        theirs, ours = (x @ f.a.T @ f.b.T for f in (found, expected.modules[module]))
        errors[module] = relative_error(theirs, ours)
    return judged(file, errors, "the file holds another change")


def reopened(folder: str | Path, expected: Adapter) -> tuple[AdapterFile, list[str]]:
    """Return a written folder, open, and the modules to compare, in order.

    Raises:
        InputError: modules or full layers are missing, not expected or of another shape.
    """
    file = open_adapter(folder, expected.name, saved_modules="keep")
    wanted = {m for m, factors in expected.modules.items() if factors.rank} or set(file.shapes)
    found = {m: (d_out, d_in) for m, (d_out, d_in, _) in file.shapes.items()}
    problems = [f"{m}: missing but expected" for m in wanted - set(found)]
    problems += [f"{m}: not expected" for m in set(found) - set(expected.modules)]
    problems += [
        f"{m}: {found[m]} but {expected.modules[m].shape} is expected"
        for m in set(found) & set(expected.modules)
        if found[m] != expected.modules[m].shape
    ]
    problems += [
        f"{name}: not the full layer that is expected"
        for name, tensor in file.whole_layers().items()
        if not torch.equal(tensor, expected.saved_modules.get(name, tensor.new_empty(0)))
    ]
    if problems:
        raise InputError(f"{file.path}: {line}. Save it again." for line in sorted(problems))
    return file, sorted(wanted)


def judged(
    file: AdapterFile, errors: Mapping[str, float], what: str, problems: Iterable[str] = ()
) -> dict[str, float]:
    """Return the number of modules and their largest error, if each is small enough.

    Args:
        file: What was read; its element type says what rounding may cause.
        errors: Relative error by module.
        what: What is wrong with a module whose error is larger.
        problems: What else is wrong, a line each.

    Raises:
        InputError: all that is wrong.
    """
    tolerance = TOLERANCES[file.dtype]
    problems = [*problems] + [
        f"{module}: {what} (relative error {error:.1e}) but at most {tolerance:.1e} is expected"
        for module, error in errors.items()
        if not error <= tolerance
    ]
    if problems:
        raise InputError(f"{file.path}: {line}. Save it again." for line in problems)
    return {"modules": float(len(errors)), "max_relative_error": max(errors.values(), default=0.0)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of `expected`, or over 1 if it is 0."""
    size = float(expected.norm()) or 1.0
    return float((found - expected).norm()) / size
