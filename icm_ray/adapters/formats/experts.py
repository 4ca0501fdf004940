"""PEFT's factors of fused experts, seen as one pair for each expert; see `adapters.fused`."""

from collections.abc import Mapping
from dataclasses import replace

from icm_ray.adapters.blocks import ends_in
from icm_ray.adapters.contents import PREFIX, tensor_keys
from icm_ray.adapters.formats.view import Stored, View
from icm_ray.adapters.fused import INNER, expert_layout, wrapper_paths
from icm_ray.adapters.gaps import covered
from icm_ray.adapters.header import MAX_TENSORS, TensorInfo
from icm_ray.adapters.policy import PlainConfig, short
from icm_ray.errors import InputError, by_cause

MAX_EXPERTS = MAX_TENSORS // 2
"""Of one adapter: the largest mixtures have 256 in each of 60 layers, under two names."""
_A, _B = (key.removeprefix(PREFIX) for key in tensor_keys("", None))


def per_expert(view: View, config: PlainConfig) -> View:
    """Return a PEFT folder's view with the experts of `target_parameters` as modules.

    Args:
        view: The folder, header read.
        config: Its checked config, without problems.

    Raises:
        InputError: naming every wrapper whose factors cannot be told apart.
    """
    targets = config.raw.get("target_parameters") or []
    if not targets or view.header is None:
        return view
    wrappers = _wrappers(view.header, config, targets)
    ranks = config.ranks(wrappers)
    header, stored = dict(view.header), dict(view.stored)
    layouts: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    for parameter, wrapper in wrappers.items():
        keys = tensor_keys(wrapper, None)
        a, b = (header.pop(key) for key in keys)
        places = [stored.pop(key, None) or Stored(view.file, key) for key in keys]
        rank = ranks[parameter]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] % rank or a.shape[0] != b.shape[1]:
            what = f"A {short(a.shape)} and B {short(b.shape)} of rank {rank}"
            expected = "(experts * rank, d_in) and (d_out, rank * experts) are expected"
            problems.append((parameter, f"{what} but {expected}. Save the adapter again."))
            continue
        experts = a.shape[0] // rank
        if len(layouts) + experts > MAX_EXPERTS:
            expected = f"at most {MAX_EXPERTS} are expected. Split the adapter"
            raise InputError(f"{view.file}: {parameter}: {experts} experts more but {expected}.")
        for expert in range(experts):
            module = f"{parameter}.{expert}"
            layouts[module] = expert_layout(expert, experts)
            key_a, key_b = tensor_keys(module, None)
            header[key_a] = TensorInfo(a.dtype, (rank, a.shape[1]))
            header[key_b] = TensorInfo(b.dtype, (b.shape[0], rank))
            rows = range(expert * rank, (expert + 1) * rank)
            stored[key_a] = replace(places[0], rows=rows)
            stored[key_b] = replace(places[1], columns=range(expert, experts * rank, experts))
    if problems:
        raise InputError(f"{view.file}: {line}" for line in by_cause(problems))
    idle = [t for t in targets if not any(ends_in(path, [t]) for path in wrappers)]
    told = (f"{view.file}: target_parameters: {short(t)} has no tensors." for t in idle)
    notes = (*view.notes, *told)
    form = f"{view.format}, fused experts"
    return replace(view, format=form, header=header, stored=stored, layouts=layouts, notes=notes)


def _wrappers(
    header: Mapping[str, TensorInfo], config: PlainConfig, targets: list[str]
) -> dict[str, str]:
    """Return the path of PEFT's wrapper by the path of its parameter."""
    paths = {key.removeprefix(PREFIX).removesuffix(_A) for key in header if key.endswith(_A)}
    paths = {path for path in paths if f"{PREFIX}{path}{_B}" in header}
    names = config.raw.get("target_modules")
    plain = frozenset(names) if isinstance(names, list) else frozenset()
    found: dict[str, str] = {}
    for owner in sorted({path.replace(INNER, "") for path in paths}):
        own = {path for path in paths if path.replace(INNER, "") == owner}
        leaves = _leaves(owner, targets)
        if not leaves or (own == {owner} and covered(owner, plain)):
            continue
        wrappers = wrapper_paths(f"{owner}.{leaf}" for leaf in leaves)
        if set(wrappers.values()) != own:
            raise InputError(
                f"{PREFIX}{owner}: {len(own)} pairs of factors but target_parameters names "
                f"{short(leaves)} there, and one pair of each is expected. Save it with PEFT."
            )
        found |= wrappers
    return found


def _leaves(owner: str, targets: list[str]) -> list[str]:
    """Return the parameters of a module that `target_parameters` names, as PEFT matches it."""
    split = (target.rpartition(".")[::2] for target in targets)
    return sorted({leaf for part, leaf in split if not part or f".{owner}".endswith(f".{part}")})
