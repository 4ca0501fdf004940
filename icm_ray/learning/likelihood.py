"""The supervised objective of a language model: the text or the answer says what comes next."""

from icm_ray.errors import RecipeError
from icm_ray.evidence.decoding import Readout, counted, next_token_nats
from icm_ray.evidence.readers import Batch
from icm_ray.learning.inputs import Seen
from icm_ray.learning.objectives import Measured, Memory


class NextTokens:
    """Mean negative log-likelihood of a text's tokens after the first, or its answer's, in nats."""

    hidden, compares = True, False
    modules: tuple[str, ...] = ()

    def __init__(self, readout: Readout | None) -> None:
        self.readout = readout

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of expert and base the measure compares with."""
        return {}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        if self.readout is None:
            raise RecipeError("objective: supervised needs the base, to read its tokens.")
        assert seen.hidden is not None
        nats = next_token_nats(seen.hidden, batch, self.readout)
        return nats.sum()[None], float(counted(batch).sum())
