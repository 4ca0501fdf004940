"""The refitted linear probe: what the frozen base can do on a task without any adapter."""

import numpy as np

from icm_ray.evaluation.heads import target_scale
from icm_ray.evaluation.metrics import weighted
from icm_ray.suites.tasks import Task

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)


def probe(
    task: Task,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
) -> np.ndarray:
    """Fit a linear model on base features and predict the test set.

    The regularisation strength is chosen on validation data, so the probe is as strong as a
    linear read-out of the base gets, and an expert that beats it learned something.

    Args:
        task: What to fit.
        train: Features `(examples, d_model)` and targets `(examples,)`.
        validation: The same, to choose the strength.
        test: Features to predict.

    Returns:
        Predictions `(examples,)` for `test`.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    mean, std = target_scale(task, train[1])
    best, best_score = None, -np.inf
    for strength in STRENGTHS:
        linear = (
            LogisticRegression(C=strength, max_iter=300)
            if task.kind == "classification"
            else Ridge(alpha=len(train[1]) * 0.01 / strength)
        )
        model = make_pipeline(StandardScaler(), linear).fit(train[0], (train[1] - mean) / std)
        guess = model.predict(validation[0]) * std + mean
        value = weighted(task, guess, validation[1], np.ones((1, len(guess))))[0]
        if value > best_score:
            best, best_score = model, value
    assert best is not None
    return best.predict(test) * std + mean
