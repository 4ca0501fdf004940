"""What every run says of its Fusion-VAE: what it loses, whether z matters, where F1 lies."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from icm_ray.fusion.data import FusionTable
from icm_ray.fusion_vae.layout import Modules, cosine, factors_of, norm
from icm_ray.fusion_vae.model import FusionModel
from icm_ray.fusion_vae.network import divergence
from icm_ray.types import Adapter, LoRAFactors

COLLAPSED = 1.0
"""Nats of KL over all latent dimensions below which z says nothing of its adapter."""
BLURRED = 0.1
"""Relative error of a reconstruction that is worth a warning (property P1)."""


def diagnosis(
    model: FusionModel,
    table: FusionTable,
    adapters: Sequence[Adapter],
    history: Sequence[Mapping[str, float]] = (),
) -> FusionModel:
    """Return the model with its report.

    `reconstruction_error` is relative and in delta space: a score of .99 can hide an error of .44,
    so it is the one to look at. `kl` is a mean over all checkpoints, in nats a latent dimension.
    `against_soup` compares the fused adapters of both forms with the plain average.
    """
    errors = {a.name: reconstruction_error(model, a) for a in sorted(adapters, key=_name)}
    with torch.no_grad():
        kl = divergence(*model.vae.encode(table.x, model.unit(table.v)))
    report: dict[str, Any] = {
        **model.report,
        "reconstruction_error": errors,
        "kl": kl.tolist(),
        "kl_total": float(kl.sum()),
        "against_soup": against_soup(model, adapters),
        "bytes": {
            "model": _size(model),
            "adapters": sum(_bytes(adapter) for adapter in adapters),
        },
        "parameters": sum(p.numel() for p in model.vae.parameters()),
        "history": {n: [step[n] for step in history] for n in (history[0] if history else ())},
    }
    report["warnings"] = warnings_of(report)
    return replace(model, report=report)


def with_size(model: FusionModel, joined: Sequence[Adapter]) -> FusionModel:
    """Return a model whose report counts the bytes of tasks that joined, and warns anew."""
    held = model.report["bytes"]["adapters"] + sum(_bytes(adapter) for adapter in joined)
    report = {**model.report, "bytes": {"model": _size(model), "adapters": held}}
    report["warnings"] = warnings_of(report)
    return replace(model, report=report)


def reconstruction_error(model: FusionModel, adapter: Adapter) -> float:
    """Return the relative error of `D(z; v)` for a finished adapter, on deltas."""
    v = model.unit(model.vectors[adapter.name])
    x = model.decoded(model.latents[adapter.name], v)
    return model.layout.error(adapter.modules, x)


def against_soup(model: FusionModel, adapters: Sequence[Adapter]) -> dict[str, dict[str, float]]:
    """Return cosine and ratio of norms of F1 against the average, decoded alone and as residual."""
    average = soup([adapter.modules for adapter in adapters])
    point = model.point([adapter.name for adapter in adapters])
    own = soup([adapter.modules for adapter in adapters], [point.weights[a.name] for a in adapters])
    forms = {}
    for form in ("decoded", "residual"):
        parts = model.parts(model.fused(point, residual=form == "residual"))
        made = {path: factors_of(part) for path, part in parts.items()}
        whole = added(made, own) if form == "residual" else made
        forms[form] = {
            "cosine": cosine(whole, average),
            "norm": norm(whole) / max(norm(average), 1e-30),
        }
    return forms


def soup(every: Sequence[Modules], weights: Sequence[float] | None = None) -> Modules:
    """Return the weighted average of deltas, as stacked factors; equal weights unless given."""
    shares = weights or [1 / len(every)] * len(every)
    factors = {}
    for path in sorted({path for modules in every for path in modules}):
        mine = [(m[path], w) for m, w in zip(every, shares, strict=True) if path in m]
        b = torch.cat([w * f.b for f, w in mine], 1)
        factors[path] = LoRAFactors(torch.cat([f.a for f, _ in mine]), b)
    return factors


def added(one: Modules, two: Modules) -> Modules:
    """Return the sum of two changes, as stacked factors."""
    paths = sorted({*one, *two})
    found = {path: [modules[path] for modules in (one, two) if path in modules] for path in paths}
    return {
        path: LoRAFactors(torch.cat([f.a for f in both]), torch.cat([f.b for f in both], 1))
        for path, both in found.items()
    }


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """Return what is wrong, each with what to do."""
    warnings = []
    if report["kl_total"] < COLLAPSED:
        warnings.append(
            f"posterior collapsed: KL {report['kl_total']:.3f} nats but more than {COLLAPSED:g} is "
            "expected; the decoder reads the task vector alone and fused latents do nothing. Lower "
            "kl_weight (1e-5), raise free_bits, or choose preset default."
        )
    blurred = {t: e for t, e in report["reconstruction_error"].items() if e > BLURRED}
    if blurred:
        task, worst = max(blurred.items(), key=lambda item: item[1])
        warnings.append(
            f"{len(blurred)} reconstructions are off by more than {BLURRED:.0%}, {task} by "
            f"{worst:.0%}. Raise vae.latent or representation.components, train longer, or on "
            "all tasks if it joined later."
        )
    return warnings


def _size(model: FusionModel) -> int:
    return sum(t.numel() * t.element_size() for t in model.tensors().values())


def _name(adapter: Adapter) -> str:
    return adapter.name


def _bytes(adapter: Adapter) -> int:
    numbers = sum(f.a.numel() + f.b.numel() for f in adapter.modules.values())
    return numbers * torch.empty(0, dtype=adapter.dtype).element_size()
