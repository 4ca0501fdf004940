"""What a merge combines: one low-rank term per task and module, and a fixed rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from icm_ray.errors import InputError
from icm_ray.linalg.lowrank import svd
from icm_ray.linalg.orthogonal import polar
from icm_ray.methods.regmean import regmean
from icm_ray.types import Adapter, LoRAFactors, ModuleContext, ModuleEvidence

ModuleTerms = Mapping[str, LoRAFactors]
"""The terms of one module by task, sorted; tasks without the module are left out."""

ReadGrams = Callable[[str], ModuleEvidence]
"""Gives the Gram statistics of a module, as methods see them."""


@dataclass(frozen=True)
class Terms:
    """The terms of every module.

    Attributes:
        tasks: All tasks, sorted.
        modules: Terms by module, sorted; each module has at least one.
        own: Whether the terms are the adapters' own factors, which need not be stored again.
        residual: What is added to the merge and never learned, by module.
        layouts: Modules that are no plain linear layer; see `types.Adapter`.
    """

    tasks: tuple[str, ...]
    modules: Mapping[str, ModuleTerms]
    own: bool = True
    residual: Mapping[str, LoRAFactors] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)

    def with_residual(self, residual: Mapping[str, LoRAFactors]) -> "Terms":
        """Return the same terms on top of a fixed merge.

        Raises:
            InputError: the merge has a module that no adapter has.
        """
        strange = sorted(set(residual) - set(self.modules))
        if strange:
            raise InputError(
                f"start: module {strange[0]}: in the saved merge but in no adapter. Start from a "
                "merge of these adapters."
            )
        return replace(self, residual=dict(residual))

    def remade(self, remake: Callable[[str, ModuleTerms], ModuleTerms]) -> "Terms":
        """Return terms that `remake` makes of each module's name and terms."""
        made = {module: remake(module, terms) for module, terms in self.modules.items()}
        return replace(self, modules=made, own=False)


def own_terms(adapters: Sequence[Adapter]) -> Terms:
    """Return the adapters' deltas as they are.

    Raises:
        InputError: a convolution is adapted, which the learner's forward pass does not do.
    """
    in_order = sorted(adapters, key=lambda adapter: adapter.name)
    layouts = {path: kind for adapter in in_order for path, kind in adapter.layouts.items()}
    convolutions = sorted(path for path, kind in layouts.items() if kind.startswith("conv"))
    if convolutions:
        raise InputError(
            f"module {convolutions[0]}: a convolution, which learned merging cannot run. Merge "
            "these adapters with a method that learns nothing."
        )
    paths = sorted({path for adapter in in_order for path in adapter.modules})
    modules = {
        path: {a.name: a.modules[path] for a in in_order if path in a.modules} for path in paths
    }
    return Terms(tuple(a.name for a in in_order), modules, layouts=layouts)


def tsv_terms(terms: Terms) -> Terms:
    """Return terms whose singular vectors no longer overlap between tasks.

    Paper: arXiv 2412.00081, TSV-Merge: each task's thin SVD, and the stacks of all left and of all
    right vectors replaced by their polar factors. The sum of the terms is TSV's merge.
    """
    return terms.remade(lambda _module, given: _orthogonalised(given))


def _orthogonalised(terms: ModuleTerms) -> dict[str, LoRAFactors]:
    spectra = {task: svd(f.b, f.a) for task, f in terms.items()}
    u = polar(torch.cat([s.u for s in spectra.values()], 1))
    v = polar(torch.cat([s.vh.T for s in spectra.values()], 1))
    ranks = [s.s.numel() for s in spectra.values()]
    parts = zip(spectra.items(), u.split(ranks, 1), v.split(ranks, 1), strict=True)
    return {
        task: LoRAFactors(own_v.T.float().contiguous(), (own_u * s.s).float())
        for (task, s), own_u, own_v in parts
    }


def regmean_terms(
    terms: Terms,
    grams: ReadGrams,
    *,
    rho: float = 1.0,
) -> Terms:
    """Return each task's share of RegMean's closed form; the sum of the terms is its merge.

    Paper: arXiv 2212.09849; see `methods.regmean`, whose result these are the blocks of.

    Args:
        terms: The adapters' own.
        grams: Called once a module; modules without any are averaged.
        rho: Factor of the Grams' off-diagonal entries.
    """

    def remake(module: str, own: ModuleTerms) -> dict[str, LoRAFactors]:
        context = ModuleContext(module, tuple(own), terms.tasks)
        whole = regmean(list(own.values()), context=context, evidence=grams(module), rho=rho)
        assert isinstance(whole, LoRAFactors)
        ranks = [term.rank for term in own.values()]
        parts = zip(own, whole.a.split(ranks), whole.b.split(ranks, 1), strict=True)
        return {task: LoRAFactors(a, b.contiguous()) for task, a, b in parts}

    return terms.remade(remake)


def summed(terms: Terms, scale: float = 1.0) -> dict[str, LoRAFactors]:
    """Return `scale` times the sum of each module's terms: a merge to start from."""
    return {
        module: LoRAFactors(
            torch.cat([f.a for f in given.values()]),
            scale * torch.cat([f.b for f in given.values()], 1),
        )
        for module, given in terms.modules.items()
    }
