"""The cut in the metric of the inputs: what it keeps, when it is made, and what is said of it."""

import pytest
import torch

import icm_ray
from icm_ray.config import MergeRecipe
from icm_ray.errors import RecipeError
from icm_ray.linalg.gram import Gram
from icm_ray.merging.cut import RankRule, cut, kept_line, loss_lines
from icm_ray.merging.folder import report_as_dict, report_from_dict
from icm_ray.merging.inputs import UNSEEN
from icm_ray.merging.requirements import check_sources
from icm_ray.merging.seen import cut_as_seen, with_seen
from icm_ray.types import Delta, LoRAFactors

SHAPES = {"m": (20, 30), "n": (9, 12), "w": (8, 8)}
"""No Gram is known of the last one."""


def inputs_of(d_in: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(50, d_in, generator=draw) * torch.linspace(0.05, 3, d_in)


@pytest.fixture
def three(make_adapter):
    return [make_adapter(name, shapes=SHAPES, rank=3) for name in "abc"]


@pytest.fixture
def grams() -> dict[str, torch.Tensor]:
    drawn = {
        (m, task): inputs_of(SHAPES[m][1], seed) for m in "mn" for seed, task in enumerate("abc")
    }
    return {f"{m}.gram.{task}": x.T @ x / len(x) for (m, task), x in drawn.items()}


def gram_of(grams, module: str) -> Gram:
    a, b, c = (Gram.of(SHAPES[module][1], grams[f"{module}.gram.{t}"]) for t in "abc")
    return a.damped(1.0, UNSEEN) + b.damped(1.0, UNSEEN) + c.damped(1.0, UNSEEN)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("made", [lambda f: f, lambda f: Delta.of(f.delta())])
def test_no_change_of_the_rank_is_nearer_on_the_inputs(made, rank) -> None:
    draw = torch.Generator().manual_seed(0)
    factors = LoRAFactors(torch.randn(9, 30, generator=draw), torch.randn(20, 9, generator=draw))
    x = inputs_of(30, 1)
    inputs, whole = Gram.of(30, x.T @ x / 50), factors.delta().double()
    root = torch.linalg.cholesky(inputs.square())
    u, s, vh = torch.linalg.svd(whole @ root, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)

    found = cut_as_seen(made(factors), RankRule("at most", rank), inputs)
    assert found.factors.rank == rank
    torch.testing.assert_close(found.factors.delta().double(), best, rtol=1e-4, atol=1e-4)
    assert found.seen is not None
    assert found.seen.values is not None
    torch.testing.assert_close(found.seen.values, s[:rank] / s.norm(), rtol=1e-5, atol=1e-5)
    assert found.seen.energy == pytest.approx(float(s[:rank].norm() / s.norm()) ** 2, rel=1e-5)
    share = float((found.factors.delta().double() - whole).norm() / whole.norm()) ** 2
    assert 1 - found.retained_energy == pytest.approx(share, rel=1e-4)

    plain = cut(made(factors), RankRule("at most", rank))
    told = with_seen(plain, made(factors), inputs).seen
    lost = float(((plain.factors.delta().double() - whole) @ root).norm() / s.norm()) ** 2
    assert told is not None
    assert 1 - told.energy == pytest.approx(lost, rel=1e-4)
    assert told.energy < found.seen.energy
    assert plain.retained_energy > found.retained_energy


def test_what_has_grams_is_cut_for_its_inputs_unless_weights_are_asked_for(three, grams) -> None:
    whole = icm_ray.merge(three, "regmean", evidence=grams)
    assert whole.report.seen_energy is None  # nothing was cut
    seen = icm_ray.merge(three, "regmean", evidence=grams, output_rank=2)
    plain = icm_ray.merge(three, "regmean", evidence=grams, output_rank=2, output_metric="weights")
    assert (seen.report.output_metric, plain.report.output_metric) == ("inputs", "weights")
    for module in SHAPES:
        one, other = (r.report.modules[module] for r in (seen, plain))
        exact = whole.adapter.modules[module]
        if module == "w":
            assert one == other
            assert one.seen_energy is None
            continue
        expected = cut_as_seen(exact, RankRule("at most", 2), gram_of(grams, module))
        torch.testing.assert_close(
            seen.adapter.modules[module].delta(), expected.factors.delta(), rtol=1e-5, atol=1e-5
        )
        assert one.seen_energy > other.seen_energy
        assert one.retained_energy < other.retained_energy
    assert seen.report.seen_energy > plain.report.seen_energy
    assert "of what inputs see" in kept_line(seen.report)
    assert "of what inputs see" in loss_lines(plain.report)[0]
    assert report_from_dict(report_as_dict(seen.report)) == seen.report


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "emr"])
def test_any_method_is_cut_for_inputs_when_asked(three, grams, method) -> None:
    result = icm_ray.merge(three, method, evidence=grams, output_rank=2, output_metric="inputs")
    plain = icm_ray.merge(three, method, output_rank=2)
    for module in "mn":
        exact = icm_ray.merge(three, method, output_rank="exact").adapter.modules[module]
        root = torch.linalg.cholesky(gram_of(grams, module).square()).float()
        off, plainly = (
            float(((r.adapter.modules[module].delta() - exact.delta()) @ root).norm())
            for r in (result, plain)
        )
        assert off < plainly
    torch.testing.assert_close(
        result.adapter.modules["w"].delta(), plain.adapter.modules["w"].delta()
    )


def test_one_budget_goes_where_inputs_see_most(three, grams) -> None:
    about = {"evidence": grams, "output_metric": "inputs", "params": {"restore_norm": True}}
    result = icm_ray.merge(three, "soup", output_rank="total:9", **about)
    ranks = {module: factors.rank for module, factors in result.adapter.modules.items()}
    exact = icm_ray.merge(three, "soup").adapter.modules
    roots = {m: torch.linalg.cholesky(gram_of(grams, m).square()).float() for m in "mn"}
    spectra = {m: f.delta() @ roots.get(m, torch.eye(8)) for m, f in exact.items()}
    shares = {m: torch.linalg.svdvals(seen) / seen.norm() for m, seen in spectra.items()}
    ninth = torch.cat(list(shares.values())).sort(descending=True).values[8]
    assert ranks == {m: int((share >= ninth * (1 - 1e-6)).sum()) for m, share in shares.items()}
    for module, rank in ranks.items():
        alone = icm_ray.merge(three, "soup", output_rank=rank, **about)
        torch.testing.assert_close(
            result.adapter.modules[module].delta(), alone.adapter.modules[module].delta()
        )
        one, other = (r.report.modules[module] for r in (result, alone))
        for kept in ("seen_energy", "retained_energy"):
            assert getattr(one, kept) == pytest.approx(getattr(other, kept), abs=1e-5)


def test_grams_that_keep_directions_and_a_diagonal_alone_will_do(three, grams) -> None:
    parts = {}
    for name, gram in grams.items():
        values, vectors = torch.linalg.eigh(gram.double())
        parts[name.replace(".gram.", ".gram_root.")] = (vectors * values.clamp(min=0).sqrt()).T
    whole, by_parts = (
        icm_ray.merge(three, "soup", evidence=e, output_rank=2, output_metric="inputs")
        for e in (grams, {name: root.float().contiguous() for name, root in parts.items()})
    )
    for module, factors in whole.adapter.modules.items():
        found = by_parts.adapter.modules[module].delta()
        torch.testing.assert_close(found, factors.delta(), rtol=1e-3, atol=1e-4)


def recipe(**changes) -> MergeRecipe:
    values = {"adapters": [{"name": "a", "path": "a"}], "method": "soup", **changes}
    return MergeRecipe.model_validate({"output": {"path": "o", "metric": "inputs"}, **values})


def test_a_cut_for_inputs_without_any_is_refused_with_the_way_on(three, grams) -> None:
    with pytest.raises(RecipeError, match=r"metric needs gram_statistics\. Name base and data"):
        check_sources(recipe(), can_gather=True)
    check_sources(recipe(base="b", data={"suite": "text"}), can_gather=True)
    with pytest.raises(RecipeError, match="'distillation' has no Gram statistics beside its"):
        icm_ray.merge(three, "distillation", output_metric="inputs")
    with pytest.raises(RecipeError, match=r"no Gram statistics\. Make it with jobs\.evid"):
        icm_ray.merge(three, "soup", output_rank=2, output_metric="inputs")
    with pytest.raises(RecipeError, match=r"uses none\. Leave it out, or set output\.metric"):
        icm_ray.merge(three, "soup", evidence=grams, output_rank=2)
