"""ESM: the directions in which tasks' inputs move outputs, joined; strong ones made stronger."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from icm_ray.linalg import lowrank
from icm_ray.linalg.gram import Gram
from icm_ray.linalg.orthogonal import polar
from icm_ray.methods.shared.grams import grams_of
from icm_ray.methods.shared.parameters import Scale
from icm_ray.methods.table import Pass
from icm_ray.types import LoRAFactors, ModuleContext, ModuleEvidence

EIGENVALUE_POWER = 0.15
"""Of a direction's share in the shift, which weighs it; in the code and in no formula."""

COUNT = "modules of "

Preset = Annotated[
    Literal["vit", "roberta"],
    Field(description="Whose code: strong tasks and columns raised besides layers, or not."),
]


def esm(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    preset: Preset = "vit",
    scale: Scale = 1.0,
) -> LoRAFactors:
    """Join the directions of each task's output shift: `scale * l^2 * mean(s_U) mean(s_V) U V`.

    The shift of task k on its inputs, `X_k delta_k^T`, has eigenvectors Q_k with eigenvalues e_k
    (`delta_k G_k delta_k^T`); `f_k = (e_k / mean)^.15`, over its own mean, weighs them. U and V are
    the polar factors of `[Q_1 f_1 .. Q_K f_K]` and `[f_1 Q_1^T delta_1; ..; f_K Q_K^T delta_K]`,
    s_U and s_V the singular values they lose. Preset vit first multiplies each task's part of the
    latter by the square of its delta's norm over the tasks' mean, then each column by the square
    of its length over the columns' mean, and in the end the result by 2. l is the result's norm
    over the mean of the modules whose paths differ in numbers only.

    Paper: arXiv 2602.20208, whose repository has two codes. vit, the default, has the paper's
    three levels of scaling (task, column, layer); roberta the last of them. Norms come out two
    to five times those of the sum, and .5 to 1.1 times: search the scale. Differs: a task brings
    `d_out / K` directions in the codes, which is arbitrary ones beyond its rank; here the
    directions it has. With fewer inputs than d_out the codes count a part of a norm twice.

    Evidence: `gram.<task>`, or `gram_root.<task>` and `gram_diagonal.<task>`; a module without any
    is seen as with inputs alike in all directions.

    Cost: O(R d_in^2 + R^2 (d_out + d_in)), twice; the result has rank R, the sum of ranks.
    """
    found = _joined(factors, context, evidence, preset)
    mean = float(context.statistics[_type_of(context.module)])
    level = (lowrank.norm(found.b, found.a) / mean) ** 2 if mean > 0 else 0.0
    return LoRAFactors(found.a, found.b * (scale * level))


def passes(**_params: Any) -> tuple[Pass, ...]:
    """Return the pass that finds the mean norm of each type of module."""
    return (Pass(_measure, _conclude),)


def _measure(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    evidence: ModuleEvidence | None = None,
    preset: Preset,
    **_params: Any,
) -> dict[str, Tensor]:
    found = _joined(factors, context, evidence, preset)
    kind = _type_of(context.module)
    norm = torch.tensor(lowrank.norm(found.b, found.a), dtype=torch.float64)
    return {kind: norm, f"{COUNT}{kind}": torch.tensor(1)}


def _conclude(total: Mapping[str, Tensor], **_told: Any) -> dict[str, Tensor]:
    counts = {name.removeprefix(COUNT): n for name, n in total.items() if name.startswith(COUNT)}
    return {kind: total[kind] / count for kind, count in counts.items()}


def _type_of(module: str) -> str:
    return re.sub(r"\d+", "#", module)


def _joined(
    factors: Sequence[LoRAFactors],
    context: ModuleContext,
    evidence: ModuleEvidence | None,
    preset: Preset,
) -> LoRAFactors:
    """Return the merge of one module before its layer's factor."""
    factors = list(factors)
    d_out, d_in = factors[0].shape
    grams = grams_of(d_in, context, evidence or {})
    most = max(d_out // len(context.all_tasks), 1)
    parts = [
        _directions(one, grams.get(task), most)
        for task, one in zip(context.tasks, factors, strict=True)
    ]
    u = torch.cat([left for left, _, _ in parts], 1)
    if not u.numel():
        return LoRAFactors.none((d_out, d_in))
    power = 2 if preset == "vit" else 0
    norms = [norm for *_, norm in parts if norm > 0]
    mean = sum(norms) / len(norms)
    v = torch.cat([right * (norm / mean) ** power for _, right, norm in parts], 1)
    if preset == "vit":
        lengths = v.norm(dim=1, keepdim=True)
        v = 2 * v * (lengths / lengths.mean()) ** 2
    u, v = _levelled(u), _levelled(v)
    return LoRAFactors(v.T.float().contiguous(), u.float())


def _directions(
    factors: LoRAFactors, gram: Gram | None, most: int
) -> tuple[Float[Tensor, "d_out q"], Float[Tensor, "d_in q"], float]:
    """Return a task's weighed directions of outputs, what of its delta goes into each, its norm."""
    a, b = factors.a.double(), factors.b.double()
    products = (a if gram is None else gram.left(a)) @ a.T
    spectrum = lowrank.svd(b, lowrank.root(products))
    values = spectrum.s[:most].square()
    weights = (values / values.mean()) ** EIGENVALUE_POWER
    weights /= weights.mean()
    q = spectrum.u[:, :most]
    return q * weights, a.T @ (b.T @ q) * weights, lowrank.norm(b, a)


def _levelled(x: Float[Tensor, "n q"]) -> Float[Tensor, "n q"]:
    """Return `x` with its singular values, zeros aside, at their mean."""
    direction = polar(x)
    return direction * ((direction * x).sum() / direction.square().sum())
