"""What a pipeline has measured so far, set by set, and how its rows are named."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import MethodRow, PipelineRecipe
from icm_ray.distributed.probes import read_probe
from icm_ray.distributed.shared_base import SharedBase
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.metrics import score
from icm_ray.evaluation.scoring import TaskScore
from icm_ray.merging.folder import MergedFolder
from icm_ray.methods import find_method
from icm_ray.suites import Suite

BATCH = 64


DEFAULT = "default"


@dataclass(frozen=True)
class Variant:
    """One setting of a row's parameters.

    Attributes:
        row: The table's row.
        params: Parameters of this setting.
        name: "default", or the grid point such as "scale=0.3".
    """

    row: MethodRow
    params: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class SetResults:
    """All that was measured with one set of experts.

    Attributes:
        label: The set, for example "shared-seed0".
        experts: Experts by task.
        grams: Folder of Gram statistics, if a row needs them.
        learned: By learned row: the folder of what it learned.
        fused: By fusion row: the folder of its Fusion-VAE, or of what was adapted from it.
        merged: Merged folders by (row, variant): default settings and chosen ones.
        chosen: By row that has a grid: the variant that was best on validation data.
        scores: By (row or reference, variant, split): scores by task.
    """

    label: str
    experts: Mapping[str, Expert]
    grams: Path | None = None
    learned: Mapping[str, Path] = field(default_factory=dict)
    fused: Mapping[str, Path] = field(default_factory=dict)
    merged: dict[tuple[str, str], MergedFolder] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    scores: dict[tuple[str, str, str], dict[str, TaskScore]] = field(default_factory=dict)

    def files(self, tasks: Sequence[str] | None = None) -> list[AdapterFile]:
        """Return the experts' adapters, all or those of some tasks, opened and checked."""
        return open_all(
            [(t, e.adapter) for t, e in self.experts.items() if tasks is None or t in tasks]
        )

    def evidence(self, row: MethodRow) -> Path | None:
        """Return the evidence a row's method needs."""
        made = self.made_for(row.name)
        return made or (self.grams if find_method(row.method).needs else None)

    def made_for(self, name: str) -> Path | None:
        """Return the folder that was learned or trained for a row, if one was."""
        return self.learned.get(name) or self.fused.get(name)


def variants(row: MethodRow) -> Iterator[Variant]:
    """Yield a row's default setting and every point of its grid."""
    yield Variant(row, row.params, DEFAULT)
    for point in product(*row.grid.values()) if row.grid else ():
        settings = dict(zip(row.grid, point, strict=True))
        name = ",".join(f"{key}={_as_text(value)}" for key, value in settings.items())
        yield Variant(row, {**row.params, **settings}, name)


def _as_text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def order_of(variant: Variant, evidence: Path | None, seed: int) -> dict[str, Any]:
    """Return what `merge` is called with."""
    return {
        "method": variant.row.method,
        "params": dict(variant.params),
        "evidence": evidence,
        "output_rank": variant.row.rank,
        "seed": seed,
    }


@dataclass(frozen=True)
class PipelineResults:
    """Everything the report is made from."""

    recipe: PipelineRecipe
    suite: Suite
    base: SharedBase
    base_path: Path
    sets: list[SetResults]
    probes: Mapping[str, Path]
    evidence: Mapping[str, Path]
    ratios: Mapping[str, Path]
    training_ratios: Mapping[str, Mapping[int, float]]


def probe_scores(results: PipelineResults) -> dict[str, TaskScore]:
    """Return the linear probe's test scores by task."""
    found = {}
    for task, folder in results.probes.items():
        _, predictions = read_probe(folder)
        examples = results.suite.load(task, "test", results.recipe.sizes.test)
        item = score(results.suite.tasks[task], predictions, examples.targets)
        found[task] = TaskScore(item, predictions)
    return found
