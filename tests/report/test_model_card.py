import pytest
import yaml

from icm_ray.report.model_card import model_card
from icm_ray.types import MergeReport, ModuleReport

EVIL = "<script>alert(1)</script>"


def make_report(**changes) -> MergeReport:
    module = ModuleReport(
        rank=4,
        exact_rank=8,
        input_norms={"topic": 1.0},
        output_norm=0.9,
        retained_energy=0.81,
        truncation_error=0.43,
    )
    values = {
        "method": "svd",
        "formula": "sum of the deltas, times scale",
        "params": {"scale": 0.3},
        "seed": 0,
        "output_rank": 4,
        "inputs": {"topic": "f1", "year": "f2"},
        "modules": {"layer.0.q": module},
    }
    return MergeReport(**(values | changes))


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_tells_what_how_and_from_what():
    card = model_card(make_report(), ["topic", "year"], "owner/base")

    assert front_matter(card) == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "merge"],
    }
    for text in ("sum of the deltas", "| topic | f1 |", "| parameter scale | 0.3 |", "81.0 %"):
        assert text in card, text
    assert 'AutoModel.from_pretrained("owner/base")' in card
    assert "icm-ray reproduce" in card
    assert "Scores" not in card


def test_scores_are_those_of_the_test_split_and_of_merges(make_row):
    rows = [make_row("svd", "topic", 0.6), make_row("expert", "topic", 0.8)]
    rows += [make_row("svd", "topic", 0.99, split="validation")]
    card = model_card(make_report(), ["topic"], "owner/base", rows)

    assert "| topic | accuracy | 0.600 | 0.580 to 0.620 | 75.0 % | 50.0 % |" in card
    assert "0.99" not in card
    assert "0.800" not in card


@pytest.mark.parametrize("base", ["/home/me/models/mini", "C:\\models\\mini", "./mini", "~/mini"])
def test_a_local_path_stays_at_home(base):
    card = model_card(make_report(), ["topic"], base)

    assert "base_model" not in front_matter(card)
    assert base not in card
    assert "of mini " in card


@pytest.mark.parametrize("name", [EVIL, "a|b\n# Heading", "`code` [x](http://y)"])
def test_names_are_escaped(name):
    card = model_card(make_report(inputs={name: "f"}, method=name), [name], name)

    assert "<script" not in card
    assert "\n# Heading" not in card
    assert "[x](" not in card.replace(r"\[x\](", "")
    front_matter(card)
