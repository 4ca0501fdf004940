"""Words that recipes and tables choose between; no torch, so that they are known at once."""

from typing import Literal

EvidenceKind = Literal["task_vectors", "gram_statistics", "learned_merge", "fusion_model"]
"""What evidence says: how adapters change the base, second moments of inputs, what was learned
between the adapters' factors, or a trained Fusion-VAE."""

CutMetric = Literal["inputs", "weights"]
"""What a cut to a smaller rank keeps most of: what the tasks' inputs see, or entries of weights."""

RANDOM = "-random"
"""Ends the label of a control: a row that merges random adapters in the experts' place."""

REALIGNED = "-heads-realigned"
"""Ends the label of a row, or of the base, that is read through heads fitted to the experts'."""

ERRORS = frozenset({"rmse"})
"""Metrics of which smaller is better: they count as the expert's over the model's."""

SavedModulesPolicy = Literal["refuse", "drop", "keep", "mean"]
"""What to do with `modules_to_save`: refuse the adapter, leave them out, keep them per task, or
average them."""
