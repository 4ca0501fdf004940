"""The folder a merge leaves behind: the adapter, its card, its report, and proof of all three."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from icm_ray.adapters import (
    AdapterFile,
    open_adapter,
    save_adapter,
    verify_forward,
    verify_written,
)
from icm_ray.adapters.base_fit import exactly_targeted
from icm_ray.adapters.base_folder import open_base
from icm_ray.errors import InputError
from icm_ray.files import (
    MANIFEST,
    RUN_FILE,
    read_json,
    whole_folder,
)
from icm_ray.kinds import SavedModulesPolicy
from icm_ray.merging.factors import keep_factors
from icm_ray.merging.whole_layers import usage_of, with_mean, write_each
from icm_ray.report import ScoreRow
from icm_ray.report.model_card import model_card
from icm_ray.report.text import markdown
from icm_ray.types import MergeReport, MergeResult, ModuleReport

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


@dataclass(frozen=True)
class Origin:
    """Where a merge came from.

    Attributes:
        files: The adapters.
        key: Identifies the order, so that a second run can skip it.
        seconds: Time the merge took.
        evidence: Where what the method was told is, for `reproduce`.
        modules_to_save: The policy that the files were opened with.
        kept: What was asked for, if copies of the adapters are to be kept with it.
        evicted: Adapters that it would have been made of, each with what kept it out.
    """

    files: Sequence[AdapterFile]
    key: str
    seconds: float = 0.0
    evidence: Path | None = None
    modules_to_save: SavedModulesPolicy = "refuse"
    kept: Mapping[str, Any] | None = None
    evicted: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def keeping(
        cls, files: Sequence[AdapterFile], key: str, seconds: float, evidence: Path | None
    ) -> "Origin":
        """Return the origin of a merge that keeps each task's head, and what else was kept."""
        policy = "keep" if any(file.saved for file in files) else "refuse"
        return cls(files, key, seconds, evidence, policy)


def write_merged(
    result: MergeResult,
    folder: Path,
    origin: Origin,
    *,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    scores: list[ScoreRow] | None = None,
) -> dict[str, float]:
    """Write a merge, read it again, compare it with the algebra, and only then show it.

    Args:
        result: What `merge` gave.
        folder: The output; appears whole or not at all.
        origin: Where it came from; whole layers that the inputs keep go to
            `saved_modules/<task>.safetensors`.
        dtype: Element type of the file; the inputs' own by default.
        base: Folder of the base model; adds a check of the whole forward pass, in PEFT.
        scores: Shown on the model card.

    Returns:
        Measured relative errors of the checks.

    Raises:
        InputError: the written adapter is not the merge, or changes nothing at all.
    """
    _refuse_no_op(result.report, folder)
    adapter = replace(result.adapter, dtype=dtype or result.adapter.dtype)
    if origin.modules_to_save == "mean":
        adapter = with_mean(adapter, origin.files)
    if base is not None:
        adapter = exactly_targeted(adapter, open_base(base))
    with whole_folder(folder, info={"key": origin.key}) as target:
        trial = target / "trial"
        save_adapter(adapter, trial)
        checks = dict(verify_written(trial, adapter))
        if base is not None:
            checks |= verify_forward(trial, adapter, base)
        own = _write_per_task(result, adapter.dtype, target / PER_TASK, checks)
        keeps = origin.modules_to_save == "keep"
        kept = write_each(origin.files, target / SAVED_MODULES) if keeps else {}
        report = {
            **report_as_dict(result.report),
            "per_task": own,
            "fingerprint": open_adapter(trial, saved_modules="keep").fingerprint,
            "dtype": dtype_name(adapter.dtype),
            "modules_to_save": origin.modules_to_save,
            "saved_modules": kept,
            **({"evicted": dict(origin.evicted)} if origin.evicted else {}),
        }
        usage = usage_of(adapter, origin.files, origin.modules_to_save)
        names = sorted(file.name for file in origin.files)
        card = model_card(result.report, names, adapter.base_model, scores or [], usage)
        card += _per_task_card(result.report.per_task) + _evicted_card(origin.evicted)
        texts = {"README.md": card, REPORT: as_json(report)}
        texts[RUN_FILE] = as_json(_run_facts(origin, checks))
        if scores:
            # Without the seconds, which no second run repeats.
            texts[SCORES] = as_json([asdict(replace(row, seconds=0.0)) for row in scores])
        (trial / MANIFEST).unlink()  # the whole folder's own is written when it is complete
        for file in trial.iterdir():
            file.rename(target / file.name)
        trial.rmdir()
        for name, text in texts.items():
            (target / name).write_text(text, encoding="utf-8")
        if origin.kept is not None:
            keep_factors(target, origin.files, origin.evidence, origin.kept)
    return checks


def _write_per_task(
    result: MergeResult, dtype: torch.dtype, folder: Path, checks: dict[str, float]
) -> dict[str, Any]:
    """Write each task's own adapter, check it like the common one, and say what the cut kept."""
    written = {}
    for task, adapter in result.per_task.items():
        stored = replace(adapter, dtype=dtype)
        save_adapter(stored, folder / task)
        found = verify_written(folder / task, stored)
        checks["max_relative_error"] = max(
            checks["max_relative_error"], found["max_relative_error"]
        )
        written[task] = {
            "fingerprint": open_adapter(folder / task).fingerprint,
            "retained_energy": result.report.per_task[task],
        }
        (folder / task / MANIFEST).unlink()  # the whole folder's own covers it
    return written


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


def _evicted_card(evicted: Mapping[str, str]) -> str:
    if not evicted:
        return ""
    lines = [f"- {markdown(name)}: {markdown(why)}" for name, why in evicted.items()]
    return "\n## Adapters left out\n\nMeant for this merge, and no part of it:\n\n" + (
        "\n".join(lines) + "\n"
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


def _run_facts(origin: Origin, checks: Mapping[str, float]) -> dict[str, Any]:
    """Return what has a clock, host or path in it and so stays out of the byte comparison."""
    return {
        "inputs": {file.name: str(file.path) for file in origin.files},
        "evidence": str(origin.evidence.absolute()) if origin.evidence else None,
        "seconds": origin.seconds,
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
    plain["seen_energy"] = report.seen_energy
    plain["per_task"] = {t: {"retained_energy": kept} for t, kept in report.per_task.items()}
    return plain


def report_from_dict(plain: Mapping[str, Any]) -> MergeReport:
    """Return the MergeReport that `report_as_dict` described."""
    names = ("method", "formula", "params", "seed", "output_rank", "inputs", "evidence")
    modules = {
        name: ModuleReport(**{**module, "absent": tuple(module["absent"])})
        for name, module in plain["modules"].items()
    }
    per_task = {task: own["retained_energy"] for task, own in plain.get("per_task", {}).items()}
    metric = plain.get("output_metric", "weights")  # absent in reports of before there were two
    told = {name: plain[name] for name in names}
    return MergeReport(**told, modules=modules, per_task=per_task, output_metric=metric)


def read_merged(folder: Path) -> MergedFolder:
    """Read back what `write_merged` wrote, without its tensors."""
    run = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    return MergedFolder(folder, read_json(folder / REPORT), run)
