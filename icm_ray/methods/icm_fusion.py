"""ICM-Fusion: adapters fused in the latent space of a Fusion-VAE, one function for every rule."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from icm_ray.errors import InputError, RecipeError
from icm_ray.evidence.tensors import Evidence, model_of
from icm_ray.fusion_vae.model import KIND, Rule
from icm_ray.linalg.lowrank import norm
from icm_ray.methods.shared.parameters import Scale, TaskWeights
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence


def icm_fusion(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    weights: TaskWeights = None,
    rule: Annotated[
        Rule,
        Field(
            description="The mean of the tasks' latents, sums of their differences from 0, or the "
            "adapters' plain average, so that validation data may choose it."
        ),
    ] = "mean",
    temperature: Annotated[
        float | None,
        Field(gt=0, description="mean: how much tasks along the fused direction count; None: not."),
    ] = 1.0,
    strength: Annotated[
        float, Field(allow_inf_nan=False, description="arithmetic: times the mean difference.")
    ] = 1.0,
    residual: Annotated[
        bool,
        Field(description="Let the decoder only bend the adapters' average; False: the paper."),
    ] = True,
    latent: Annotated[
        bool, Field(description="False: z* = 0, to see what v* alone says; with residual off.")
    ] = True,
    scale: Scale = 1.0,
) -> LoRAFactors:
    """Decode the fused latent: `D(z*; v*)`, z* from the tasks' latents, v* from their task vectors.

    Evidence is a Fusion-VAE that `jobs.train_fusion` trained on these tasks or on more, or what was
    adapted from its latents. Conflicts between task vectors are projected out; their sum is v*.
    With `residual` the result is `sum_k w_k delta_k + D(z*; v*) - sum_k w_k D(z_k; v_k)`, so that
    a single adapter comes back exactly; without it, within the reconstruction error that the
    Fusion-VAE's report names.

    Paper: ICM-Fusion, arXiv 2508.04153, Eq. 5 to 7.
    Differs: the paper does not say how latents are fused; `mean` is the smallest reading of it, and
    `residual` is ours. Parameters but `scale` do nothing to evidence that was adapted already.

    Raises:
        RecipeError: there is no evidence for this module.
        InputError: evidence that does not fit the adapters.
    """
    del weights, rule, temperature, strength, residual, latent  # `prepare` has acted on them
    if not evidence or not {"left", "core", "right"} <= set(evidence):
        raise RecipeError(
            f"evidence: {context.module}: nothing fused. Train a Fusion-VAE with jobs.train_fusion."
        )
    left, core, right = (evidence[name].float() for name in ("left", "core", "right"))
    shape = (left.shape[0], right.shape[1])
    inner = (left.shape[1], right.shape[0])
    fits = {1: inner == (len(core), len(core)), 2: inner == core.shape}.get(core.ndim, False)
    if shape != factors[0].shape or not fits:
        raise InputError(
            f"evidence: {context.module}: {tuple(left.shape)}, {tuple(core.shape)}, "
            f"{tuple(right.shape)} but a change of {factors[0].shape} is expected. Train again."
        )
    rest: list[LoRAFactors] = []
    if "shares" in evidence:
        numbers = evidence["shares"].float()[context.rows].tolist()
        for number, factors_k in zip(numbers, factors, strict=True):
            inside = _between(left, factors_k, right) if core.ndim == 2 else None
            if inside is None:
                rest.append(LoRAFactors(factors_k.a, number * factors_k.b))
            else:
                core = core + number * inside
    if "residual_a" in evidence:
        rest.append(LoRAFactors(evidence["residual_a"].float(), evidence["residual_b"].float()))
    b = torch.cat([left * core if core.ndim == 1 else left @ core, *(f.b for f in rest)], 1)
    return LoRAFactors(torch.cat([right, *(f.a for f in rest)]), scale * b)


def _between(left: Tensor, factors: LoRAFactors, right: Tensor) -> Tensor | None:
    """Return the core of a delta between orthonormal bases, or None if they do not span it."""
    core = (left.T @ factors.b) @ (factors.a @ right.T)
    whole = norm(factors.b, factors.a) ** 2
    return core if whole - float(core.double().square().sum()) <= 1e-6 * whole else None


def prepare(
    model_evidence: Evidence,
    tasks: Sequence[str],
    *,
    weights: Mapping[str, float] | None,
    rule: Rule,
    temperature: float | None,
    strength: float,
    residual: bool,
    latent: bool,
    scale: float,
) -> Evidence:
    """Return a Fusion-VAE's fusion of some tasks, as tensors by module; other evidence as it is."""
    del scale
    if model_evidence.kind != KIND:
        return model_evidence
    model = model_of(model_evidence)
    point = model.point(
        tasks, weights=weights, rule=rule, temperature=temperature, strength=strength
    )
    if not latent:
        point = replace(point, z=torch.zeros_like(point.z))
    tensors: dict[str, Tensor] = {}
    residual = residual or rule == "soup"
    fused = torch.zeros(model.layout.size)  # of a residual: the average, bent by nothing
    if rule != "soup":
        fused = model.fused(point, residual=residual)
    for path, part in model.parts(fused).items():
        for name in ("left", "core", "right"):
            tensors[f"{path}.{name}"] = getattr(part, name).contiguous()
        if residual:
            shares = torch.tensor([point.weights[task] for task in sorted(tasks)])
            tensors[f"{path}.shares"] = shares
    return replace(model_evidence, tensors=tensors, names=frozenset(tensors), file=None)
