"""A merged folder long after it was written: is it intact, and does it come out the same again?"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from icm_ray.adapters import (
    AdapterFile,
    load_adapter,
    open_adapter,
    open_all,
    verify_forward,
    verify_with_peft,
)
from icm_ray.adapters.policy import CONFIG_FILE
from icm_ray.errors import InputError
from icm_ray.evidence.tensors import read_evidence
from icm_ray.files import FACTORS, MANIFEST, RUN_FILE, read_json, read_manifest, sha256_of_file
from icm_ray.linalg import lowrank
from icm_ray.merging.folder import (
    PER_TASK,
    REPORT,
    SCORES,
    MergedFolder,
    Origin,
    read_merged,
    report_from_dict,
    write_merged,
)
from icm_ray.merging.merge import merge_as_asked
from icm_ray.merging.order import MergeRequest
from icm_ray.report import ScoreRow
from icm_ray.types import Adapter, MergeReport

NORM_TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


def verify_folder(folder: Path, base: Path | None = None) -> dict[str, Any]:
    """Check a merged folder long after it was written.

    Hashes against the manifest, PEFT's reading against ours, norms against the report; with a
    base, the whole forward pass.

    Raises:
        InputError: what does not hold, all of it.
    """
    read_manifest(folder)
    if (folder / FACTORS).is_dir():
        read_manifest(folder / FACTORS)
    adapter = load_adapter(folder, saved_modules="keep")
    report = read_json(folder / REPORT)
    checks: dict[str, Any] = dict(verify_with_peft(folder, adapter))
    tolerance = NORM_TOLERANCE[report["dtype"]]
    problems = []
    for module, expected in report["modules"].items():
        factors = adapter.modules.get(module)
        norm = lowrank.norm(factors.b, factors.a) if factors else 0.0
        if abs(norm - expected["output_norm"]) > tolerance * max(expected["output_norm"], 1e-12):
            problems.append(
                f"{folder}: {module}: norm {norm:.6g} but {REPORT} says "
                f"{expected['output_norm']:.6g}. Merge again."
            )
    if adapter.fingerprint != report["fingerprint"]:
        problems.append(f"{folder}: fingerprint differs from {REPORT}. Merge again.")
    for task, own in report.get("per_task", {}).items():
        if open_adapter(folder / PER_TASK / task).fingerprint != own["fingerprint"]:
            problems.append(f"{folder / PER_TASK / task}: differs from {REPORT}. Merge again.")
    if problems:
        raise InputError(problems)
    if base is not None:
        checks |= verify_forward(folder, adapter, base)
    return {"modules": len(report["modules"]), "fingerprint": adapter.fingerprint, **checks}


def reproduce(folder: Path) -> list[str]:
    """Merge again from the inputs and compare every file's sha256 with the manifest.

    Returns:
        Names of the files compared, all equal.

    Raises:
        InputError: an input is gone or has changed, or a file comes out different.
    """
    manifest = read_manifest(folder)
    merged = read_merged(folder)
    report = report_from_dict(merged.report)
    if "inputs" not in merged.run:
        raise InputError(f"{folder / RUN_FILE}: missing, so where the inputs are is not known.")
    # Absent in reports of before the policy was recorded.
    policy = merged.report.get("modules_to_save", "refuse")
    base = read_json(folder / CONFIG_FILE)["base_model_name_or_path"]
    files = open_all(list(merged.run["inputs"].items()), policy, base=base, same_base=True)
    _refuse_changed(files, report)
    evidence = _same_evidence(folder, merged, report)
    request = MergeRequest(
        report.method,
        report.params,
        evidence,
        report.output_rank,
        report.seed,
        output_metric=report.output_metric,
    )
    again = merge_as_asked([file.load() for file in files], request)
    again = replace(again, adapter=_targeted_as(folder, again.adapter))
    scores = None
    if (folder / SCORES).is_file():
        scores = [ScoreRow(**row) for row in read_json(folder / SCORES)]
    with tempfile.TemporaryDirectory(prefix="icm_ray-") as scratch:
        copy = Path(scratch) / "again"
        origin = Origin(
            files,
            manifest["key"],
            evidence=evidence,
            modules_to_save=policy,
            evicted=merged.report.get("evicted", {}),
        )
        dtype = getattr(torch, merged.report["dtype"])
        write_merged(again, copy, origin, dtype=dtype, scores=scores)
        names = sorted(manifest["files"])
        different = [
            name
            for name in names
            if not (copy / name).is_file() or sha256_of_file(copy / name) != manifest["files"][name]
        ]
    if different:
        raise InputError(
            [f"{folder / name}: comes out different when merged again." for name in different]
        )
    return [*names, MANIFEST]


def _targeted_as(folder: Path, adapter: Adapter) -> Adapter:
    """Return a merge that names its modules as a folder does: in full, where its base wanted it."""
    if read_json(folder / CONFIG_FILE).get("target_modules") != sorted(adapter.modules):
        return adapter
    config = {key: value for key, value in adapter.config.items() if key != "target_modules"}
    return replace(adapter, config=config)


def _refuse_changed(files: list[AdapterFile], report: MergeReport) -> None:
    changed = [f for f in files if f.fingerprint != report.inputs.get(f.name)]
    if changed:
        raise InputError(
            [f"{f.path}: is not the adapter this merge was made from any more." for f in changed]
        )


def _same_evidence(folder: Path, merged: MergedFolder, report: MergeReport) -> Path | None:
    """Return where the method's evidence is, after checking that it is still the same."""
    if report.evidence is None:
        return None
    place = merged.run.get("evidence")
    if place is None:
        raise InputError(
            f"{folder / RUN_FILE}: evidence: none but the merge was told some as tensors in memory."
            " Merge again with a path to repeat it."
        )
    if read_evidence(Path(place)).identity != report.evidence:
        raise InputError(f"{place}: is not the evidence this merge was made with any more.")
    return Path(place)
