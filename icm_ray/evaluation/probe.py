"""The refitted linear probe: what the frozen base can do on a task without any adapter."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.evaluation.detection import box_loss
from icm_ray.evaluation.heads import Head, target_scale
from icm_ray.evaluation.metrics import weighted
from icm_ray.suites.tasks import Task

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
RIDGE_SCALE = 0.01
"""Ridge's penalty per example at strength 1, which puts its grid where logistic regression's is."""

Labelled = tuple[Float[Tensor, "_ d_model"], np.ndarray]
"""Features (pooled, or of patches) and targets, of boxes what each patch should say of them;
training and validation differ in length."""


def fit_probe(task: Task, train: Labelled, validation: Labelled) -> Head:
    """Fit a linear head on features of the frozen base.

    The regularisation strength is chosen on validation data, so the probe is as strong as a
    linear read-out of the base gets, and an expert that beats it has learned something. Experts
    start from this head: what they gain, the adapter gained.

    Args:
        task: What to fit.
        train: Pooled features `(examples, d_model)` and targets `(examples,)`.
        validation: The same, to choose the strength.
    """
    mean, std = target_scale(task, train[1])
    heads = (_fit(task, train[0].numpy(), (train[1] - mean) / std, s) for s in STRENGTHS)
    scaled = [Head(head.weight, head.bias, mean, std) for head in heads]
    return scaled[int(np.argmax([_judged(task, head, *validation) for head in scaled]))]


def _judged(task: Task, head: Head, features: Tensor, targets: np.ndarray) -> float:
    """Return how good a head is; larger is better."""
    if task.kind == "detection":
        return -float(box_loss(head.logits(features), torch.from_numpy(targets)).mean())
    # A dense task's rows are patches: they are judged as the patches of one image.
    targets = targets[None] if task.metric == "miou" else targets
    said = head.predict(features, task).reshape(targets.shape)
    return float(weighted(task, said, targets, np.ones((1, len(targets))))[0])


def _fit(task: Task, features: np.ndarray, targets: np.ndarray, strength: float) -> Head:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    standard = np.asarray(scaler.transform(features))
    if task.kind == "detection":
        weight, bias = _descended(task, standard, targets, strength)
    elif not task.is_class:
        ridge = Ridge(alpha=len(targets) * RIDGE_SCALE / strength).fit(standard, targets)
        weight, bias = ridge.coef_[None], np.atleast_1d(ridge.intercept_)
    else:
        logistic = LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(standard, targets)
        weight, bias = _one_row_a_class(task, logistic)
    weight = weight / scaler.scale_
    bias = bias - weight @ np.asarray(scaler.mean_)
    return Head(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())


def _descended(
    task: Task, features: np.ndarray, targets: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight and bias of least loss of boxes, penalised as logistic regression is."""
    read, wanted = torch.from_numpy(features).float(), torch.from_numpy(targets)
    weight = torch.zeros(task.outputs, features.shape[1], requires_grad=True)
    bias = torch.zeros(task.outputs, requires_grad=True)
    descent = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        penalty = weight.square().sum() / (2 * strength * len(read))
        total = box_loss(read @ weight.T + bias, wanted).mean() + penalty
        total.backward()
        return total

    descent.step(closure)
    return weight.detach().double().numpy(), bias.detach().double().numpy()


def _one_row_a_class(task: Task, logistic: object) -> tuple[np.ndarray, np.ndarray]:
    """Spread sklearn's rows over all classes: it leaves out absent ones, and one of two."""
    coefficients, intercepts = logistic.coef_, logistic.intercept_  # type: ignore[attr-defined]
    seen = logistic.classes_.astype(int)  # type: ignore[attr-defined]
    if len(seen) == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight = np.zeros((len(task.classes), coefficients.shape[1]))
    bias = np.full(len(task.classes), intercepts.min() - 10.0)
    weight[seen], bias[seen] = coefficients, intercepts
    return weight, bias
