"""Progress bars that driver and workers draw on one terminal."""

import contextlib
from collections.abc import Iterator
from typing import Any


class Bar:
    """A bar over a known number of things."""

    def __init__(self, drawn: Any) -> None:
        self._drawn, self.done = drawn, 0

    def add(self, count: int = 1) -> None:
        """Say that so many more are done."""
        self.done += count
        self._drawn.update(count)

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
        yield Bar(drawn)
    finally:
        drawn.close()
