"""One results table while it is made: its recipe, its experts, and what was measured so far."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import DataSpec, EngineSpec, FinetuneRecipe, MethodRow, PipelineRecipe
from icm_ray.distributed.session import Session
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.scoring import TaskScore
from icm_ray.kinds import SavedModulesPolicy
from icm_ray.merging.folder import MergedFolder
from icm_ray.merging.order import MergeRequest
from icm_ray.merging.requirements import needs_of
from icm_ray.report.data import TrainingCurve
from icm_ray.suites import Suite
from icm_ray.workflows.evicting import Evicted, evicted_lines

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


@dataclass
class Offer:
    """Methods that were chosen for a recipe that names none.

    Attributes:
        rows: What is tried, cheapest first.
        left_out: What is not, by name, with the reason.
        seconds: What each row should take on all workers together.
        scoring: The part of it that comes when everything is learned: merging and scores.
        ends: When the budget is used up, by the monotonic clock.
        path: Where it is kept.
    """

    rows: list[MethodRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    scoring: dict[str, float] = field(default_factory=dict)
    ends: float = math.inf
    path: Path | None = None


@dataclass
class SetResults:
    """One set of experts and all that was made of it and measured with it, stage by stage.

    Attributes:
        label: The set, for example "shared-seed0".
        experts: Experts by task.
        unproven: Folders of adapters that no task asks for; they are merged and not scored.
        unseen: Tasks without an expert that a base answers by itself; scored beside it.
        modules_to_save: What becomes of whole layers that are no heads.
        evidence: Folder of task vectors and null-space ratios.
        grams: Folder of Gram statistics, if a row needs them.
        grams_again: Folder of those through a merge, if a row wants them.
        learned: By learned row: the folder of what it learned.
        fused: By fusion row: the folder of its Fusion-VAE, or of what was adapted from it.
        merged: Merged folders by (row, variant): default settings and chosen ones.
        searched: By row that searches: the setting that Ray Tune found.
        chosen: By row that has a grid: the variant that was best on validation data.
        random: Folders of random adapters like the experts, if a row is a control.
        scores: By (row or reference, variant, split): scores by task.
    """

    label: str
    experts: Mapping[str, Expert]
    unproven: Mapping[str, Path] = field(default_factory=dict)
    unseen: Sequence[str] = ()
    modules_to_save: SavedModulesPolicy = "refuse"
    evidence: Path | None = None
    grams: Path | None = None
    grams_again: Path | None = None
    learned: dict[str, Path] = field(default_factory=dict)
    fused: dict[str, Path] = field(default_factory=dict)
    merged: dict[tuple[str, str], MergedFolder] = field(default_factory=dict)
    searched: dict[str, Variant] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    random: dict[str, Path] = field(default_factory=dict)
    scores: dict[tuple[str, str, str], dict[str, TaskScore]] = field(default_factory=dict)

    @property
    def scored(self) -> tuple[str, ...]:
        """Every task that merges are scored on."""
        return *self.experts, *self.unseen

    def files(self, tasks: Sequence[str] | None = None) -> list[AdapterFile]:
        """Return all adapters, or those of some tasks, opened and checked."""
        known = {task: expert.adapter for task, expert in self.experts.items()}
        return self._opened({**known, **self.unproven}, tasks)

    def files_of(self, row: MethodRow) -> list[AdapterFile]:
        """Return what a row merges."""
        return self._opened(self.random, row.tasks) if row.random else self.files(row.tasks)

    def _opened(self, known: Mapping[str, Path], tasks: Sequence[str] | None) -> list[AdapterFile]:
        refs = [(t, path) for t, path in known.items() if tasks is None or t in tasks]
        return open_all(refs, self.modules_to_save, run_by="jobs.pipeline")

    def fingerprints(self) -> dict[str, str]:
        """Return what identifies each adapter."""
        return {file.name: file.fingerprint for file in self.files()}

    def proven(self) -> list[AdapterFile]:
        """Return the experts' adapters alone."""
        return self.files(tuple(self.experts))

    def variants(self, row: MethodRow) -> Iterator[Variant]:
        """Yield a row's settings, what was found for this set among them."""
        yield from variants(row)
        if row.name in self.searched:
            yield self.searched[row.name]

    def evidence_for(self, row: MethodRow) -> Path | None:
        """Return the evidence that a row merges with."""
        made = self.made_for(row.name)
        return made or (self.grams_for(row) if needs_of(row.method, row.metric) else None)

    def grams_for(self, row: MethodRow) -> Path | None:
        """Return the Gram statistics that a row reads."""
        return self.grams_again if row.again else self.grams

    def made_for(self, name: str) -> Path | None:
        """Return the folder that was learned or trained for a row, if one was."""
        return self.learned.get(name) or self.fused.get(name)


@dataclass(frozen=True)
class Gone:
    """What a table goes on without.

    Attributes:
        why: By task or adapter: why its workers could do nothing with it.
        merges: By row that was to merge some of them: which.
        of_rows: What is said of rows that name some, one line each.
    """

    why: Evicted = field(default_factory=dict)
    merges: Mapping[str, Collection[str]] = field(default_factory=dict)
    of_rows: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        """What a report says of all that."""
        return [*evicted_lines(self.why), *self.of_rows]

    def from_row(self, row: str) -> dict[str, str]:
        """Return what a row was to merge as well, each with the reason."""
        # A row that was offered merges everything.
        names = self.merges.get(row, self.why)
        return {name: why for name, why in self.why.items() if name in names}


@dataclass(frozen=True)
class Table:
    """A table that is being made; a second run of the same recipe only reads it.

    Attributes:
        recipe: What to run; experts alone are a table without rows.
        suite: The recipe's.
        root: Output folder.
        session: The base on the cluster.
        sets: One entry for each set of experts.
        probes: Folder of each headed task's linear probe.
        ratios: Folders of ratios by learned row, of the first set.
        curves: How the experts of the first set went over their training, by task.
        offer: The methods of a recipe that names none.
        gone: What was left out of the recipe, as it was written.
    """

    recipe: FinetuneRecipe
    suite: Suite
    root: Path
    session: Session
    sets: list[SetResults] = field(default_factory=list)
    probes: dict[str, Path] = field(default_factory=dict)
    ratios: dict[str, Path] = field(default_factory=dict)
    curves: dict[str, TrainingCurve] = field(default_factory=dict)
    offer: Offer = field(default_factory=Offer)
    gone: Gone = field(default_factory=Gone)

    @property
    def rows(self) -> list[MethodRow]:
        """The table's methods: the recipe's, or those that were offered."""
        named = self.recipe.methods if isinstance(self.recipe, PipelineRecipe) else []
        return self.offer.rows if named is None else named

    @property
    def engine(self) -> EngineSpec | None:
        """How DeepSpeed trains the Fusion-VAEs, if it does."""
        return self.recipe.engine if isinstance(self.recipe, PipelineRecipe) else None

    @property
    def realigns(self) -> bool:
        """Whether merges are read through re-aligned heads, too."""
        return isinstance(self.recipe, PipelineRecipe) and self.recipe.realign_heads

    @property
    def validates_all(self) -> bool:
        """Whether rows without a grid are scored on validation data too, to choose the best."""
        recipe = self.recipe
        return isinstance(recipe, PipelineRecipe) and (bool(recipe.adapters) or not recipe.methods)

    @property
    def name(self) -> str:
        """What the report is called."""
        return self.recipe.name if isinstance(self.recipe, PipelineRecipe) else "experts"

    def inputs(self, row: MethodRow | None = None) -> DataSpec:
        """Return which inputs evidence is gathered from, or what a row asks for instead."""
        count = (row and row.inputs) or self.recipe.sizes.calibration
        split = row.split if row else "calibration"
        return DataSpec(suite=self.recipe.suite, inputs_per_task=count, split=split)

    def rows_that_need(self, kind: str) -> list[MethodRow]:
        """Return the rows that cannot do without a kind of evidence."""
        return [row for row in self.rows if needs_of(row.method, row.metric) == kind]

    def request(self, one: SetResults, variant: Variant) -> MergeRequest:
        """Return what a setting asks of the merge of a set's experts."""
        row = variant.row
        evidence = one.evidence_for(row)
        return MergeRequest(
            row.method,
            dict(variant.params),
            evidence,
            row.rank,
            self.session.seed,
            output_metric=row.metric,
        )


def variants(row: MethodRow) -> Iterator[Variant]:
    """Yield a row's default setting and every point of its grid."""
    yield Variant(row, row.params, DEFAULT)
    for point in product(*row.grid.values()) if row.grid else ():
        settings = dict(zip(row.grid, point, strict=True))
        yield Variant(row, {**row.params, **settings}, variant_name(settings))


def variant_name(settings: Mapping[str, Any]) -> str:
    """Return a setting in short, such as "scale=0.3,density=0.5"."""
    return ",".join(
        f"{key}={value:g}" if isinstance(value, int | float) else f"{key}={value}"
        for key, value in settings.items()
    )
