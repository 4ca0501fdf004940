"""How near an answer in words is: numbers worked out by hand."""

import pytest

from icm_ray.evaluation.generated import SCORERS
from icm_ray.evaluation.metrics import MEASURES
from icm_ray.suites.tasks import METRICS


def test_every_scorer_is_a_metric() -> None:
    assert SCORERS.keys() <= {*METRICS["generation"]} & MEASURES.keys()


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        ("a red ball and a blue box.", "a blue box and a red ball.", 1.0),
        ("a red ball.", "a red ball and a blue box.", 2 / 3),
        ("a red box and a blue ball.", "a red ball and a blue box.", 0.0),
        ("a red ball, a red ball and a red ball.", "a red ball.", 0.5),
        ("An orange cube.", "an orange cube.", 1.0),
        ("red ball", "a red ball.", 0.0),
        ("", "a red ball.", 0.0),
    ],
)
def test_pair_f1_counts_things_and_not_their_order(said, wanted, value) -> None:
    assert SCORERS["pair_f1"](said, wanted) == pytest.approx(value)
