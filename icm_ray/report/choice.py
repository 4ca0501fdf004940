"""What a run recommends, in sentences that the page, the table and the terminal share."""

from collections.abc import Iterator

from icm_ray.report.data import Choice, Difference
from icm_ray.report.text import method_label, number, percent

SHOWN = 3
"""Methods that are named of those that were not tried."""


def choice_lines(choice: Choice) -> list[str]:
    """Return why this merge, what it lost, whether to serve the adapters apart, what was left."""
    return [*_why(choice), *_verdict(choice), *_lost(choice), *_rest(choice)]


def _why(choice: Choice) -> Iterator[str]:
    setting = f" at {choice.params}" if choice.params and choice.params != "default" else ""
    name = method_label(choice.method, choice.tuned)
    if not choice.compared:
        yield f"{name}{setting} is in adapter/: nothing else was compared on validation data."
        return
    mean = percent(choice.mean)
    line = f"{name}{setting} is in adapter/: best of {choice.compared} by validation, {mean} of "
    line += "the adapters' own scores"
    if choice.second and choice.ahead:
        ahead = choice.ahead
        line += f", {_points(ahead)} points ahead of {choice.second}"
        line += "" if ahead.low > 0 else ", which is within the interval: the two are as good"
    yield f"{line}."


def _verdict(choice: Choice) -> Iterator[str]:
    if choice.apart is None:
        return
    apart = f"{_points(choice.apart)} points"
    if choice.apart.high < 0:
        yield (
            f"Serving the adapters apart is better: on test data the best merge is {apart} beside "
            "them. Merge if one adapter is worth that."
        )
    elif choice.apart.low > 0:
        yield f"It beats serving the adapters apart: {apart} on test data."
    else:
        yield f"It is as good as serving the adapters apart: {apart} on test data."
    if choice.base is not None and choice.base.high < 0:
        yield f"It is worse than the base alone: {_points(choice.base)} points. Do not use it."
    elif choice.base is not None and choice.base.low <= 0:
        yield f"It is no better than the base alone beyond the interval: {_points(choice.base)}."


def _lost(choice: Choice) -> Iterator[str]:
    losses = sorted(choice.losses.items(), key=lambda item: item[1].mean)
    if losses:
        told = ", ".join(f"{task} {_points(one)}" for task, one in losses)
        yield f"What each adapter lost (points of its own test score): {told}."


def _rest(choice: Choice) -> Iterator[str]:
    if choice.unproven:
        yield f"Merged and unproven, for want of a task: {', '.join(choice.unproven)}."
    if choice.unseen:
        yield f"Scored without an adapter of its own: {', '.join(choice.unseen)}."
    if choice.left_out:
        told = [f"{name} ({why})" for name, why in sorted(choice.left_out.items())]
        more = f"; and {len(told) - SHOWN} more, in results.json" if len(told) > SHOWN else ""
        yield f"Not tried, {len(told)}: {'; '.join(told[:SHOWN])}{more}."


def _points(difference: Difference) -> str:
    mean, low, high = (100 * v for v in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} ({number(low, 1)} to {number(high, 1)})"
