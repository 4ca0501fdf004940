"""Progress of driver and workers: bars on one terminal, lines where it is a file, Ray's metrics."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from ray.experimental.tqdm_ray import RAY_TQDM_MAGIC

from icm_ray.backend_lines import LEVEL

QUIET_SECONDS = 60.0
"""A line says how far a long stage is; between two of them so much time passes."""


class Lines:
    """Takes the place of Ray's manager of bars: one line a stage, when it ends."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}  # by bar: its start, and its last line

    def process_state_update(self, state: dict[str, Any]) -> None:
        """Tell what Ray has heard of a bar, if it is time to."""
        now, bar = time.monotonic(), state["uuid"]
        started, told = self._known.setdefault(bar, (now, now))
        if state["closed"] or now - told >= QUIET_SECONDS:
            self._known[bar] = (started, now)
            done = f"{state['x']} of {state['total']}"
            print(f"{state['desc']}: {done}, {now - started:.0f} s", file=sys.stderr, flush=True)
        if state["closed"]:
            del self._known[bar]

    def hide_bars(self) -> None:
        """Lines need not make way for others."""

    def unhide_bars(self) -> None:
        """They never went."""


def calm_progress() -> None:
    """Let this driver show workers' bars and nothing else of them.

    They are lines where nobody looks at a terminal. Who sets Ray's own level of logs sees all.
    """
    from ray.experimental import tqdm_ray

    if not sys.stderr.isatty():
        tqdm_ray._manager = Lines()  # type: ignore[assignment]
    if LEVEL not in os.environ:
        _leave_words_in_logs()


def _leave_words_in_logs() -> None:
    """Show of workers their bars alone; what they and their libraries say is in Ray's log files.

    What fails comes back as an error. The autoscaler is heard: it says what no node can hold.
    """
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as streams

    for name, show in list(streams.handlers):

        def show_bars(data: Mapping[str, Any], show: Callable[..., None] = show) -> None:
            if data.get("pid") != "autoscaler":
                data = {**data, "lines": [x for x in data["lines"] if RAY_TQDM_MAGIC in x]}
            if data["lines"]:
                show(data)

        streams.remove_handler(name)
        streams.add_handler(name, show_bars)


@cache
def _metrics() -> tuple[Any, Any]:
    """Return what Ray's metrics show of stages: how much is done, and of how much."""
    from ray.util.metrics import Gauge

    done = Gauge("icm_ray_done", "Pieces of a stage that are done.", ("stage",))
    return done, Gauge("icm_ray_pieces", "Pieces of a stage.", ("stage",))


class Bar:
    """A bar over a known number of things, on the terminal and in Ray's metrics."""

    def __init__(self, drawn: Any, total: int, label: str) -> None:
        self._drawn, self.done, self._tags = drawn, 0, {"stage": label}
        self._gauge, pieces = _metrics()
        pieces.set(total, self._tags)

    def add(self, count: int = 1) -> None:
        """Say that so many more are done."""
        self.done += count
        self._drawn.update(count)
        self._gauge.set(self.done, self._tags)

    def reach(self, done: int) -> None:
        """Say how many are done by now; a resumed run starts there."""
        self.add(done - self.done)


@contextlib.contextmanager
def bar(total: int, label: str, *, every: float | None = None) -> Iterator[Bar]:
    """Draw a bar for the body.

    Args:
        total: What it counts to.
        label: Shown before it.
        every: Seconds between two drawings; None: Ray's own.
    """
    from ray.experimental import tqdm_ray

    interval: dict[str, Any] = {} if every is None else {"flush_interval_s": every}
    drawn: Any = tqdm_ray.tqdm(total=total, desc=label, **interval)
    try:
        yield Bar(drawn, total, label)
    finally:
        drawn.close()
