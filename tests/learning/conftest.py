"""Three tasks on the tiny BERT: adapters of different ranks, inputs, heads and labels."""

from collections.abc import Callable

import pytest
import torch

from icm_ray.base_model.loading import Base, load_base
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.evaluation.heads import Head
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.terms import Terms, own_terms
from icm_ray.types import Adapter

PARTS = ("self.query", "self.value", "output.dense")
MODULES = {f"encoder.layer.{i}.attention.{part}": (16, 16) for i in (0, 1) for part in PARTS}
LAST = "encoder.layer.1.attention.output.dense"


@pytest.fixture(scope="session")
def tiny(tiny_bert) -> Base:
    return load_base(tiny_bert)


@pytest.fixture(scope="session")
def adapters(make_adapter) -> list[Adapter]:
    ranks = {"code": 2, "law": 3, "med": 2}
    return [make_adapter(t, shapes=MODULES, rank=r, spread=0.4) for t, r in ranks.items()]


@pytest.fixture(scope="session")
def terms(adapters) -> Terms:
    return own_terms(adapters)


@pytest.fixture(scope="session")
def make_tasks(tiny, adapters, texts) -> Callable[..., list[TaskInputs]]:
    """Tasks on eight texts each: two classifications and a regression, labelled on request."""

    def make(batch: int = 3, labels: bool = False) -> list[TaskInputs]:
        made = []
        for number, adapter in enumerate(adapters):
            own = texts[number * 8 : number * 8 + 8]
            batches = make_batches(tokenize(tiny.tokenizer, own, 16), batch, 0)
            draw = torch.Generator().manual_seed(number)
            outputs = 1 if adapter.name == "med" else 4
            weight = torch.randn(outputs, 16, generator=draw)
            head = Head(weight, torch.randn(outputs, generator=draw))
            kind = "regression" if adapter.name == "med" else "classification"
            targets = (
                torch.arange(8.0) % 4 if kind == "classification" else torch.linspace(-1, 1, 8)
            )
            made.append(TaskInputs(adapter, batches, head, kind, targets if labels else None))
        return made

    return make
