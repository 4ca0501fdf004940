"""The folder a merge leaves behind: the adapter, its card, its report, and proof of all three."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from icm_ray.adapters import (
    AdapterFile,
    open_adapter,
    save_adapter,
    verify_forward,
    verify_written,
)
from icm_ray.adapters.contents import PREFIX
from icm_ray.errors import InputError
from icm_ray.files import (
    MANIFEST,
    RUN_FILE,
    read_json,
    whole_folder,
)
from icm_ray.report import ScoreRow, model_card
from icm_ray.types import MergeReport, MergeResult, ModuleReport, SavedModulesPolicy

REPORT = "merge_report.json"
SCORES = "scores.json"
SAVED_MODULES = "saved_modules"
PER_TASK = "per_task"
NO_OP = 1e-6
"""A merge this much smaller than its largest input has cancelled out, up to rounding."""


@dataclass(frozen=True)
class MergedFolder:
    """A merged adapter on disk.

    Attributes:
        folder: A PEFT folder with card, report and manifest.
        report: Contents of `merge_report.json`.
        run: Contents of `run.json`: paths, seconds, versions.
    """

    folder: Path
    report: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the adapter as stored."""
        return self.report["fingerprint"]


def write_merged(
    result: MergeResult,
    folder: Path,
    *,
    key: str,
    inputs: Mapping[str, str],
    seconds: float,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    scores: list[ScoreRow] | None = None,
    files: Sequence[AdapterFile] = (),
    modules_to_save: SavedModulesPolicy = "refuse",
    evidence: Path | None = None,
) -> dict[str, float]:
    """Write a merge, reload it with PEFT, compare it with the algebra, and only then show it.

    Args:
        result: What `merge` gave.
        folder: The output; appears whole or not at all.
        key: Identifies the order, so that a second run can skip it.
        inputs: Path of each adapter by name, for `reproduce`.
        seconds: Time the merge took.
        dtype: Element type of the file; the inputs' own by default.
        base: Folder of the base model; adds a check of the whole forward pass.
        scores: Shown on the model card.
        files: The inputs; whole layers that they keep go to `saved_modules/<task>.safetensors`.
        modules_to_save: The policy they were opened with.
        evidence: Where what the method was told is, for `reproduce`.

    Returns:
        Measured relative errors of the checks.

    Raises:
        InputError: the written adapter is not the merge, or changes nothing at all.
    """
    _refuse_no_op(result.report, folder)
    adapter = replace(result.adapter, dtype=dtype or result.adapter.dtype)
    kept = {f.name: [n.removeprefix(PREFIX) for n in f.saved] for f in files if f.saved}
    with whole_folder(folder, info={"key": key}) as target:
        trial = target / "trial"
        save_adapter(adapter, trial)
        checks = dict(verify_written(trial, adapter))
        if base is not None:
            checks |= verify_forward(trial, adapter, base)
        own = _write_per_task(result, adapter.dtype, target / PER_TASK, checks)
        report = {
            **report_as_dict(result.report),
            "per_task": own,
            "fingerprint": open_adapter(trial).fingerprint(),
            "dtype": dtype_name(adapter.dtype),
            "modules_to_save": modules_to_save,
            "saved_modules": kept,
        }
        card = model_card(result.report, sorted(inputs), adapter.base_model, scores or [])
        card += _per_task_card(result.report.per_task) + _saved_card(kept)
        texts = {"README.md": card, REPORT: as_json(report)}
        texts[RUN_FILE] = as_json(_run_facts(inputs, seconds, checks, evidence))
        if scores:
            # Without the seconds, which no second run repeats.
            texts[SCORES] = as_json([asdict(replace(row, seconds=0.0)) for row in scores])
        (trial / MANIFEST).unlink()  # the whole folder's own is written when it is complete
        for file in trial.iterdir():
            file.rename(target / file.name)
        trial.rmdir()
        for name, text in texts.items():
            (target / name).write_text(text, encoding="utf-8")
        _copy_saved_modules(files, target / SAVED_MODULES)
    return checks


def _write_per_task(
    result: MergeResult, dtype: torch.dtype, folder: Path, checks: dict[str, float]
) -> dict[str, Any]:
    """Write each task's own adapter, check it like the common one, and say what the cut kept."""
    told = {}
    for task, adapter in result.per_task.items():
        stored = replace(adapter, dtype=dtype)
        save_adapter(stored, folder / task)
        found = verify_written(folder / task, stored)
        checks["max_relative_error"] = max(
            checks["max_relative_error"], found["max_relative_error"]
        )
        told[task] = {
            "fingerprint": open_adapter(folder / task).fingerprint(),
            "retained_energy": result.report.per_task[task],
        }
        (folder / task / MANIFEST).unlink()  # the whole folder's own covers it
    return told


def _per_task_card(per_task: Mapping[str, float]) -> str:
    if not per_task:
        return ""
    lines = [
        f"- `{PER_TASK}/{task}`: {share:.1%} of its energy" for task, share in per_task.items()
    ]
    return (
        "\n## An adapter for each task\n\nThis method makes one common adapter, which is this "
        "folder, and one for each task, to be loaded when the task is known. The cut to a LoRA "
        "kept:\n\n" + "\n".join(lines) + "\n"
    )


def _refuse_no_op(report: MergeReport, folder: Path) -> None:
    tasks = {task for module in report.modules.values() for task in module.input_norms}
    inputs = {
        t: sum(m.input_norms.get(t, 0.0) ** 2 for m in report.modules.values()) for t in tasks
    }
    merged = sum(m.output_norm**2 for m in report.modules.values())
    if merged <= NO_OP**2 * max(inputs.values(), default=0.0):
        reason = "every input is zero" if not any(inputs.values()) else "the inputs cancel out"
        raise InputError(
            f"{folder}: the merged adapter changes nothing ({reason}) but a change is expected. "
            "Check the adapters with icm-ray inspect, and the weights."
        )


def _saved_card(kept: Mapping[str, Sequence[str]]) -> str:
    if not kept:
        return ""
    lines = [f"- `{SAVED_MODULES}/{t}.safetensors`: {len(n)} tensors" for t, n in kept.items()]
    return (
        "\n## Whole layers beside the merge\n\nLayers that `modules_to_save` trained are not "
        "merged. Each task's own are kept; load them over the base for that task:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _copy_saved_modules(files: Sequence[AdapterFile], folder: Path) -> None:
    """Write one file a task; a task's layers are read one task at a time."""
    for file in files:
        if file.saved:
            folder.mkdir(exist_ok=True)
            with file.open() as handle:
                tensors = {n.removeprefix(PREFIX): handle.get_tensor(n) for n in file.saved}
            save_file(tensors, folder / f"{file.name}.safetensors", metadata={"format": "pt"})


def _run_facts(
    inputs: Mapping[str, str], seconds: float, checks: Mapping[str, float], evidence: Path | None
) -> dict[str, Any]:
    """Return what has a clock, host or path in it and so stays out of the byte comparison."""
    return {
        "inputs": dict(inputs),
        "evidence": str(evidence.absolute()) if evidence else None,
        "seconds": seconds,
        "checks": checks,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
    }


def as_json(value: Any) -> str:
    """Return sorted, indented JSON with a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def report_as_dict(report: MergeReport) -> dict[str, Any]:
    """Return a MergeReport as plain data."""
    plain = asdict(report)
    plain["retained_energy"] = report.retained_energy
    plain["per_task"] = {t: {"retained_energy": kept} for t, kept in report.per_task.items()}
    return plain


def report_from_dict(plain: Mapping[str, Any]) -> MergeReport:
    """Return the MergeReport that `report_as_dict` described."""
    names = ("method", "formula", "params", "seed", "output_rank", "inputs", "evidence")
    modules = {
        name: ModuleReport(**{**module, "absent": tuple(module["absent"])})
        for name, module in plain["modules"].items()
    }
    per_task = {task: told["retained_energy"] for task, told in plain.get("per_task", {}).items()}
    return MergeReport(**{name: plain[name] for name in names}, modules=modules, per_task=per_task)


def read_merged(folder: Path) -> MergedFolder:
    """Read back what `write_merged` wrote, without its tensors."""
    run = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    return MergedFolder(folder, read_json(folder / REPORT), run)
