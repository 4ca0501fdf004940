import math
from dataclasses import astuple

import pytest

from icm_ray.errors import InputError
from icm_ray.report import summarise
from icm_ray.report.findings import check_experts, headline
from icm_ray.report.summary import init_of


def test_numbers_of_one_expert_set_by_hand(make_scores):
    soup = next(one for one in summarise(make_scores(), "test").sets if one.method == "soup")

    assert soup.mean == pytest.approx((0.6 / 0.8 + 0.5 / 0.8) / 2)
    assert soup.worst == pytest.approx(0.5 / 0.8)
    assert soup.worst_task == "year"
    assert soup.mean_kept == pytest.approx((0.5 + 0.25) / 2)
    assert soup.worst_kept == pytest.approx(0.25)


def test_numbers_over_expert_sets_by_hand(make_scores):
    soup = summarise(make_scores(), "test").of_init("shared")[0]

    assert (soup.method, len(soup.sets)) == ("soup", 2)
    assert astuple(soup.mean) == pytest.approx((0.7125, 0.6875, 0.7375))
    assert astuple(soup.scores["topic"]) == pytest.approx((0.62, 0.6, 0.64))


def test_best_comes_first_and_references_last_whatever_the_order(make_scores):
    rows = make_scores()
    labels = [row.label for row in summarise(rows, "test").across]

    assert labels == ["soup", "ties", "expert", "probe", "base"]
    assert summarise(reversed(rows), "test") == summarise(rows, "test")
    assert summarise(rows, "validation").across == ()


def test_a_control_is_no_merge_however_well_it_scores(make_scores, make_row):
    rows = [*make_scores(), *(make_row("soup-random", task, 0.99) for task in ("topic", "year"))]
    summary = summarise(rows, "test")
    assert [row.label for row in summary.across][:3] == ["soup", "ties", "soup-random"]
    assert "soup-random" in [row.label for row in summary.of_init("shared", references=True)]
    assert headline(summary, "shared").by_mean.method == "soup"


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_undefined_gain_is_left_out(nothing, make_row):
    rows = [make_row("soup", "a", 0.6), make_row("soup", "b", 0.6, gain_kept=nothing)]
    one = summarise(rows, "test").sets[0]

    assert one.mean_kept == one.worst_kept == pytest.approx(0.5)
    assert summarise(rows[1:], "test").sets[0].mean_kept is None


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_diverged_merge_does_not_win_by_leaving_out_its_failure(nothing, make_row, make_scores):
    rows = [*make_scores(), make_row("broken", "topic", 0.79)]
    rows += [make_row("broken", "year", math.nan, normalised=nothing)]
    summary = summarise(rows, "test")

    assert [row.method for row in summary.of_init("shared")] == ["soup", "ties", "broken"]
    assert summary.of_init("shared")[-1].missing == ("year",)
    assert headline(summary, "shared").by_mean.method == "soup"


def test_tuned_and_default_are_apart_but_the_same_setting_twice_is_refused(make_row):
    tuned = make_row("soup", "topic", 0.7, tuned=True)
    rows = [make_row("soup", "topic", 0.6), tuned]

    assert [one.label for one in summarise(rows, "test").sets] == ["soup (tuned)", "soup"]
    with pytest.raises(InputError, match=r"'soup \(tuned\)', 'topic': two test scores"):
        summarise([*rows, tuned], "test")


@pytest.mark.parametrize(
    ("expert_set", "init"), [("shared-seed0", "shared"), ("a-b-seed12", "a-b"), ("mine", "mine")]
)
def test_init_of(expert_set, init):
    assert init_of(expert_set) == init


def test_headline_names_the_winners_and_counts_what_is_clearly_below(make_row, make_scores):
    found = headline(summarise(make_scores(), "test"), "shared")

    assert (found.by_mean.method, found.by_worst.method, found.last.method) == (
        "soup",
        "soup",
        "ties",
    )
    assert (found.below, found.compared) == (4, 4)
    assert headline(summarise([make_row("expert", "a", 0.8)], "test"), "shared") is None


def test_an_expert_beats_the_probe_only_beyond_both_intervals(make_row, make_scores):
    checks = check_experts(make_scores(), "test")[:2]

    assert [(check.task, check.verdict) for check in checks] == [
        ("topic", "beyond"),
        ("year", "above"),
    ]
    lone = check_experts([make_row("expert", "a", 0.8)], "test")
    assert lone[0].verdict == "no probe"


def test_a_paired_interval_decides_where_there_is_one(make_row):
    rows = [make_row("expert", "a", 0.60), make_row("probe", "a", 0.58)]
    (touching,) = check_experts(rows, "test")
    label = touching.expert_set
    assert touching.verdict == "above"
    assert check_experts(rows, "test", {label: {"a": (0.01, 0.03)}})[0].verdict == "beyond"
    assert check_experts(rows, "test", {label: {"a": (-0.01, 0.03)}})[0].verdict == "above"


def test_adapters_of_their_own_for_each_task_are_no_winners(make_row, make_scores):
    own = [
        make_row("emr-per-task", task, 0.79, expert_set=name)
        for name in ("shared-seed0", "shared-seed1")
        for task in ("topic", "year")
    ]
    plain = headline(summarise(make_scores(), "test"), "shared")
    beside = headline(summarise([*make_scores(), *own], "test"), "shared")
    assert beside.by_mean.method == plain.by_mean.method != "emr-per-task"
    assert beside.by_worst.method == plain.by_worst.method


def test_a_smaller_error_is_the_better_score(make_row):
    def rows(expert, probe, base=0.9):
        scores = {"expert": expert, "probe": probe, "base": base, "soup": 0.5}
        return [make_row(method, "a", score, metric="rmse") for method, score in scores.items()]

    def verdict(expert, probe, gain=None):
        gains = {rows(expert, probe)[0].expert_set: {"a": gain}} if gain else None
        return check_experts(rows(expert, probe), "test", gains)[0].verdict

    assert verdict(0.2, 0.4) == "beyond"
    assert verdict(0.4, 0.2) == "not above"
    assert verdict(0.39, 0.4) == "above"
    assert verdict(0.39, 0.4, (-0.03, -0.01)) == "beyond"
    assert verdict(0.39, 0.4, (-0.03, 0.01)) == "above"
    found = headline(summarise(rows(0.2, 0.4), "test"), "shared")
    assert (found.below, found.compared) == (1, 1)
