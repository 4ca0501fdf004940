"""What our methods are compared with: PEFT's merges, and naive ones written from the papers.

A naive peer does what a paper's formulas say, on dense matrices and without any thought for cost.
It is nobody's code, and says so in the tables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icm_ray.seeding import generator
from icm_ray.types import LoRAFactors

DENSITY = 0.2
RHO, RIDGE = 0.9, 1e-6
DRAW_SEED = 0
"""PEFT draws from torch's own generator, which is seeded so that its masks can be drawn again."""

Merged = tuple[Tensor, Tensor] | Tensor
"""One layer's result: factors `(b, a)`, or the dense matrix."""
Found = dict[str, Merged]
"""Results by layer."""
EvidenceTensors = Mapping[str, Tensor]
Layers = Mapping[str, Sequence[LoRAFactors]]
"""Every task's factors by layer."""


@dataclass(frozen=True)
class Side:
    """What one side's turn calls, and what makes it ready for the next one, unmeasured."""

    call: Callable[[], Found]
    tidy: Callable[[], object] = lambda: None


Maker = Callable[[Layers, int, EvidenceTensors], Side]
"""Makes a peer's side of every task's factors, the output rank and evidence."""


def peft_call(kind: str, layers: Layers, rank: int, _evidence: EvidenceTensors) -> Side:
    """Return PEFT's merge on a module of plain linear layers that holds every adapter."""
    from peft import LoraConfig, get_peft_model

    shapes = {layer: factors[0].shape for layer, factors in layers.items()}
    base: Any = nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (o, i) in shapes.items()})
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(shapes), init_lora_weights=False
    )
    names = [f"task{k}" for k in range(len(next(iter(layers.values()))))]
    model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for layer, factors in layers.items():
        for name, one in zip(names, factors, strict=True):
            base[layer].lora_A[name].weight.data.copy_(one.a)
            base[layer].lora_B[name].weight.data.copy_(one.b)
    weights = [1 / len(names)] * len(names)
    options = {"density": DENSITY, **({"svd_rank": rank} if kind.endswith("svd") else {})}

    def call() -> Found:
        torch.manual_seed(DRAW_SEED)
        model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
        merged = {n: (base[n].lora_B["merged"], base[n].lora_A["merged"]) for n in shapes}
        return {n: (b.weight.detach(), a.weight.detach()) for n, (b, a) in merged.items()}

    return Side(call, tidy=lambda: model.delete_adapter("merged"))


def peft_function(name: str, layers: Layers, _rank: int, _evidence: EvidenceTensors) -> Side:
    """Return PEFT's element-wise function on dense deltas, which exist before the clock starts."""
    from peft.utils import merge_utils

    dense = {layer: [one.delta() for one in factors] for layer, factors in layers.items()}
    function = getattr(merge_utils, name)

    def call() -> Found:
        torch.manual_seed(DRAW_SEED)
        found = {}
        for layer, deltas in dense.items():
            weights = torch.full((len(deltas),), 1 / len(deltas))
            found[layer] = function(deltas, weights, DENSITY)
        return found

    return Side(call)


def naive(
    merge: Callable[[Sequence[LoRAFactors], EvidenceTensors], Tensor],
    layers: Layers,
    _rank: int,
    evidence: EvidenceTensors,
) -> Side:
    """Return a merge of dense matrices, layer by layer."""

    def call() -> Found:
        found: Found = {}
        for layer, factors in layers.items():
            start = f"{layer}."
            own = {n[len(start) :]: t for n, t in evidence.items() if n.startswith(start)}
            with torch.no_grad():
                found[layer] = merge(factors, own)
        return found

    return Side(call)


def knots_ties(factors: Sequence[LoRAFactors], _evidence: EvidenceTensors) -> Tensor:
    """KnOTS (arXiv 2410.19735): SVD of the deltas side by side, TIES on the tasks' parts of V."""
    deltas = [one.b.double() @ one.a.double() for one in factors]
    u, s, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    kept = s > 1e-6 * s[0]
    parts = (s[kept, None] * vh[kept]).split(deltas[0].shape[1], dim=1)
    return u[:, kept] @ ties(torch.stack(parts), DENSITY)


def core_space(factors: Sequence[LoRAFactors], _evidence: EvidenceTensors) -> Tensor:
    """Core Space: bases from SVDs of the stacked factors, TIES on the tasks' core matrices.

    In float64: an entry at the edge of the trim falls to the other side where rounding turns the
    basis, and one entry is a percent of the result.
    """
    pairs = [(one.b.double(), one.a.double()) for one in factors]
    u = torch.linalg.svd(torch.cat([b for b, _ in pairs], dim=1), full_matrices=False).U
    vh = torch.linalg.svd(torch.cat([a for _, a in pairs]), full_matrices=False).Vh
    cores = torch.stack([(u.T @ b) @ (a @ vh.T) for b, a in pairs])
    return u @ ties(cores, DENSITY) @ vh


def ties(values: Tensor, density: float) -> Tensor:
    """TIES (arXiv 2306.01708) on `(tasks, ...)`: trim each task, elect signs, disjoint mean."""
    flat = values.flatten(1)
    trimmed = torch.zeros_like(flat)
    dropped = flat.shape[1] - int(flat.shape[1] * density)
    for row, out in zip(flat, trimmed, strict=True):
        least = row.abs().kthvalue(dropped).values if dropped else 0.0
        out.copy_(torch.where(row.abs() >= least, row, 0.0))
    signs = trimmed.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    agrees = trimmed * signs > 0
    merged = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return merged.view(values.shape[1:])


def lora_lego(factors: Sequence[LoRAFactors], evidence: EvidenceTensors) -> Tensor:
    """LoRA-LEGO (arXiv 2409.16167): k-means of rank-one units in the space they live in."""
    units = torch.cat([torch.cat([one.a, one.b.T], dim=1) for one in factors])
    centres = units[evidence["init_idx"]]
    labels = torch.zeros(len(units), dtype=torch.long)
    for _ in range(10):
        labels = (units[:, None] - centres[None]).square().sum(2).argmin(1)
        for c in labels.unique():
            centres[c] = units[labels == c].mean(0)
    d_in = factors[0].shape[1]
    total = torch.zeros(factors[0].shape)
    for c in labels.unique():
        members = units[labels == c]
        mean = members.mean(0)
        mean = mean * (members.norm(dim=1).mean() / mean.norm())
        total += torch.outer(mean[d_in:], mean[:d_in])
    return total * (factors[0].rank / len(centres)) ** 0.5


def tsv(factors: Sequence[LoRAFactors], _evidence: EvidenceTensors) -> Tensor:
    """TSV-Merge (arXiv 2412.00081): SVD of each delta, stacks made orthogonal by their polars."""
    spectra = [torch.linalg.svd(one.delta(), full_matrices=False) for one in factors]
    ranks = [one.rank for one in factors]
    u = torch.cat([x.U[:, :rank] for x, rank in zip(spectra, ranks, strict=True)], dim=1)
    s = torch.cat([x.S[:rank] for x, rank in zip(spectra, ranks, strict=True)])
    vh = torch.cat([x.Vh[:rank] for x, rank in zip(spectra, ranks, strict=True)])
    p, _, q = torch.linalg.svd(u, full_matrices=False)
    r, _, t = torch.linalg.svd(vh, full_matrices=False)
    return (p @ q) * s @ (r @ t)


def regmean(factors: Sequence[LoRAFactors], evidence: EvidenceTensors) -> Tensor:
    """RegMean (arXiv 2212.09849): `(sum_k delta_k G_k)(sum_k G_k)^-1` on dense deltas, float64."""
    total = torch.zeros(factors[0].shape[1], factors[0].shape[1], dtype=torch.float64)
    right = torch.zeros(factors[0].shape, dtype=torch.float64)
    for k, one in enumerate(factors):
        gram = evidence[f"gram.task{k}"].double()
        diagonal = gram.diagonal().clone()
        gram *= RHO
        gram.diagonal().copy_(diagonal + RIDGE * diagonal.mean())
        total += gram
        right += one.delta().double() @ gram
    return torch.linalg.solve(total, right, left=False)


def first_units(layers: Layers, rank: int) -> EvidenceTensors:
    """Return units to start k-means from, the same on both sides."""
    units = {}
    for layer, factors in layers.items():
        count = sum(one.rank for one in factors)
        draw = generator(DRAW_SEED, "first units", layer)
        units[f"{layer}.init_idx"] = torch.randperm(count, generator=draw)[:rank]
    return units


def input_grams(layers: Layers, rank: int) -> EvidenceTensors:
    """Return a Gram matrix for each task: few strong directions over an uneven diagonal."""
    grams = {}
    for layer, factors in layers.items():
        d_in = factors[0].shape[1]
        for k in range(len(factors)):
            draw = generator(DRAW_SEED, f"task{k}", layer)
            x = torch.randn(4 * rank, d_in, generator=draw)
            gram = x.T @ x / len(x)
            gram.diagonal().add_(torch.rand(d_in, generator=draw) + 0.5)
            grams[f"{layer}.gram.task{k}"] = gram
    return grams
