"""What a run recommends, in words."""

from dataclasses import replace

from icm_ray.report import Choice, Difference, choice_lines


def gap(mean, low, high):
    return Difference(mean=mean, low=low, high=high)


CHOICE = Choice(
    method="ties",
    tuned=True,
    params="scale=0.5",
    compared=3,
    mean=0.91,
    second="soup",
    ahead=gap(0.02, 0.01, 0.03),
    apart=gap(-0.09, -0.11, -0.07),
    base=gap(0.4, 0.3, 0.5),
    losses={"b": gap(-0.02, -0.04, 0.0), "a": gap(-0.16, -0.2, -0.12)},
)


def test_it_says_why_it_won_and_what_each_adapter_lost():
    first, apart, lost = choice_lines(CHOICE)
    assert "ties (tuned) at scale=0.5" in first
    assert "best of 3 by validation, 91.0 %" in first
    assert "+2.0 (1.0 to 3.0) points ahead of soup." in first
    assert apart.startswith("Serving the adapters apart is better")
    assert lost.index("a -16.0 (-20.0 to -12.0)") < lost.index("b -2.0")


def test_a_lead_within_the_interval_is_none():
    (first, *_) = choice_lines(replace(CHOICE, ahead=gap(0.001, -0.02, 0.02)))
    assert "the two are as good" in first


def test_it_says_how_it_stands_beside_the_adapters_and_the_base():
    even = choice_lines(replace(CHOICE, apart=gap(0.0, -0.01, 0.01)))[1]
    assert even.startswith("It is as good as serving the adapters apart")
    above = choice_lines(replace(CHOICE, apart=gap(0.05, 0.01, 0.09)))[1]
    assert above.startswith("It beats serving the adapters apart")
    useless = choice_lines(replace(CHOICE, base=gap(-0.1, -0.2, -0.05)))
    assert any(line.startswith("It is worse than the base alone: -10.0") for line in useless)
    unsure = "\n".join(choice_lines(replace(CHOICE, base=gap(0.1, -0.2, 0.3))))
    assert "no better than the base alone beyond the interval" in unsure


def test_what_was_left_out_is_listed():
    lines = choice_lines(
        replace(CHOICE, left_out={"nsc": "the budget"}, unproven=("x",), unseen=("y",))
    )
    assert "Not tried, 1: nsc (the budget)." in lines
    assert "Merged and unproven, for want of a task: x." in lines
    assert "Scored without an adapter of its own: y." in lines


def test_of_much_that_was_left_out_the_first_are_named():
    lines = choice_lines(replace(CHOICE, left_out={f"m{n}": "why" for n in range(9)}))
    assert "Not tried, 9: m0 (why); m1 (why); m2 (why); and 6 more, in results.json." in lines


def test_a_single_row_was_not_compared():
    (first, *_) = choice_lines(replace(CHOICE, compared=0, mean=None, second=None, ahead=None))
    assert "nothing else was compared" in first
