"""The plain values of one pipeline run; all that the report shows is computed from these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from icm_ray.kinds import ERRORS, RANDOM, REALIGNED

EXPERT = "expert"
PROBE = "probe"
BASE = "base"
REFERENCES = (EXPERT, PROBE, BASE)
"""Row labels that are no merges: what a merge is compared with."""


def is_reference(method: str) -> bool:
    """Say whether a row's label is one of `REFERENCES`, or of a merge of random adapters."""
    plain = method.removesuffix(REALIGNED)
    return plain in REFERENCES or plain.endswith(RANDOM)


OF_TASKS = "-per-task"
"""Ends the label of a row where each task is scored with its own adapter, not the common one."""

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("test", "validation")
Table = Mapping[str, Mapping[str, float]]
"""Numbers by row and column."""
Gains = Mapping[str, Mapping[str, tuple[float, float]]]
"""Intervals by expert set and task."""


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One score: one adapter (or reference) on one task's examples.

    Attributes:
        expert_set: The experts that were merged, `<init>-seed<k>`, for example "shared-seed0".
        method: Row label. "expert" is the task's own adapter, "base" the frozen base with the
            expert's head (LoRA off), "probe" a linear probe refitted on the frozen base.
        tuned: Whether parameters were chosen on the validation split.
        params: Short text such as "scale=0.3".
        rank: Largest rank of the scored adapter.
        task: The task's name.
        split: Which examples were scored.
        metric: What `score` is; larger is better, but of `kinds.ERRORS`.
        score: The metric's value.
        low: Lower end of the 95 % bootstrap interval of `score`.
        high: Upper end of that interval.
        spearman: Rank correlation, for regressions.
        perplexity: Of a language model, beside `score`.
        bits_per_character: Of a language model; does not depend on its tokenizer.
        exact_match: Share of answers that are exactly what was wanted, for generations.
        rmse: Root of the mean squared error over all patches, for dense regressions.
        map: Mean average precision over intersections of .5 to .95, for detections.
        normalised: score / expert's score. None (or NaN) where that is undefined.
        gain_kept: (score - base) / (expert - base). None (or NaN) where expert equals base.
        seconds: Wall time of the merge, and processor time of what it learned before.
        seen: Whether the task's expert is among those that were merged.
    """

    expert_set: str
    method: str
    tuned: bool
    params: str
    rank: int
    task: str
    split: Split
    metric: str
    score: float
    low: float
    high: float
    spearman: float | None = None
    perplexity: float | None = None
    bits_per_character: float | None = None
    exact_match: float | None = None
    rmse: float | None = None
    map: float | None = None
    normalised: float | None
    gain_kept: float | None
    seconds: float
    seen: bool = True

    def beats(self, other: "ScoreRow") -> bool:
        """Say whether this score of the same task is the better one."""
        return self.score < other.score if self.metric in ERRORS else self.score > other.score

    def is_clear_of(self, other: "ScoreRow") -> bool:
        """Say whether it is better by intervals that do not touch."""
        return self.high < other.low if self.metric in ERRORS else self.low > other.high


@dataclass(frozen=True, kw_only=True)
class LearnedRow:
    """What one learned merge of one set of experts was, and how it got there.

    Attributes:
        method: Label of the row.
        history: Loss of each step, by task.
        shares: How much of each task's expert is in each module: its coefficient, or for a core
            matrix the norm of what the core holds between this expert's own row and column space,
            over the norm of the expert's change. A fixed start beneath the core is not in it.
        core: Whether `shares` are norms.
        unmoved: Parameters that no target depends on; they stayed at their start.
        warnings: What is wrong with the objective, by task.
    """

    method: str
    history: Mapping[str, Sequence[float]]
    shares: Table
    core: bool = False
    unmoved: Sequence[str] = ()
    warnings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A learned row beside the best merge of the same experts that learns nothing.

    Attributes:
        init: The kind of LoRA init; the means are over its expert sets.
        method: The learned row.
        baseline: The best other row by mean on the same split.
        difference: Mean over tasks and sets of the normalised score, minus the baseline's.
        low: Lower end of its paired 95 % bootstrap interval over examples.
        high: Upper end.
    """

    init: str
    method: str
    baseline: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """How one expert went over its training; Figure 1 of arXiv 2603.26317.

    Attributes:
        kind: What its task asks for.
        steps: Those that were kept; 0 is before the first.
        ratios: Mean null-space ratio over its modules, on its own inputs.
        losses: Of the step's batch; NaN at 0.
        scores: Validation score with the finished head.
    """

    kind: str
    steps: Sequence[int]
    ratios: Sequence[float]
    losses: Sequence[float]
    scores: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean over tasks of the difference of normalised scores, with its paired 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which merge a run recommends, and why.

    Attributes:
        method: Label of the row.
        tuned: Whether its setting was chosen, too.
        params: The setting, in short.
        compared: How many rows it was chosen from, on validation data; 0: nothing was compared.
        mean: Its mean normalised validation score.
        second: Label of the next best row, if there is one.
        ahead: Beside that one, on validation data.
        apart: Beside the adapters served apart, on test data.
        base: Beside the base alone, on test data.
        losses: The same as `apart`, by task.
        left_out: Methods that were not tried, each with the reason.
        unproven: Merged adapters that no task asks for.
        unseen: Scored tasks without an adapter.
    """

    method: str
    tuned: bool
    params: str
    compared: int
    mean: float | None
    second: str | None
    ahead: Difference | None
    apart: Difference | None
    base: Difference | None
    losses: Mapping[str, Difference]
    left_out: Mapping[str, str] = field(default_factory=dict)
    unproven: Sequence[str] = ()
    unseen: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What one pipeline run found out. Whatever is left empty is left out of the report.

    Attributes:
        title: Headline of the page.
        command: The command that repeats the run.
        base: The base model: name, fingerprint, licence, note.
        tasks: For each task: kind, metric, classes, source, licence, test_examples, test_hash
            and test_reads (how often the test split was scored).
        scores: Every score, in any order.
        ratios: For each task and module, the null-space ratio of the task's inputs under the
            base's features and under the expert's.
        task_vector_cosines: Cosine of each pair of task vectors.
        delta_cosines: Cosine of each pair of whole weight changes.
        input_cosines: Cosine of each pair of tasks' Gram statistics, if a row needed these.
        input_lines: What they say, in words.
        retained_energy: For each method and module, the share the final cut kept, in [0, 1].
        expert_gains: Paired 95 % interval of the expert's test score minus the probe's, or minus
            the base's for tasks without a head.
        learned: What the learned rows of the first expert set learned.
        state_ratios: By learned row, base or expert, then task and module: the ratio of the test
            inputs under its features; unlike `ratios`, every example counts the same.
        quartiles: By row and classification: accuracy on the test inputs of the lowest quarter of
            null-space ratios to that of the highest.
        curves: By task, how the expert went over its training.
        gaps: Learned rows beside the best that learns nothing.
        choice: What the run recommends, if it was told to choose.
        notes: What a reader must know to read the numbers rightly.
    """

    title: str
    command: str
    base: Mapping[str, str]
    tasks: Mapping[str, Mapping[str, str | int]]
    scores: Sequence[ScoreRow]
    ratios: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    task_vector_cosines: Table = field(default_factory=dict)
    delta_cosines: Table = field(default_factory=dict)
    input_cosines: Table = field(default_factory=dict)
    input_lines: Sequence[str] = ()
    retained_energy: Table = field(default_factory=dict)
    expert_gains: Gains = field(default_factory=dict)
    learned: Sequence[LearnedRow] = ()
    state_ratios: Mapping[str, Table] = field(default_factory=dict)
    quartiles: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    curves: Mapping[str, TrainingCurve] = field(default_factory=dict)
    gaps: Sequence[Gap] = ()
    choice: Choice | None = None
    notes: Sequence[str] = ()
