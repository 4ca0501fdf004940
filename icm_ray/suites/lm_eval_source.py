"""A task of lm-eval, by its name or as a YAML file, as a table: its prompts, choices and answers.

lm-eval words what is asked, and this project scores the answers: of a multiple choice as lm-eval's
`acc` does, by the likelihood of each choice after the prompt.
"""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from icm_ray.config import LmEvalData, TaskKind
from icm_ray.errors import InputError, RecipeError
from icm_ray.files import sha256_of
from icm_ray.suites.own_scorer import is_allowed
from icm_ray.suites.rows import MAX_ROWS, Row

KINDS: dict[str, TaskKind] = {
    "multiple_choice": "multiple_choice",
    "generate_until": "generation",
    "loglikelihood_rolling": "language_modelling",
}
"""What lm-eval calls an output, and the kind of task it is."""
ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class LmEvalSource:
    """The documents of one task, those of its splits one after the other.

    Attributes:
        data: The task's name or file.
        kind: What the suite takes it for.
        file: The file, if it is one.
    """

    data: LmEvalData
    kind: TaskKind
    file: Path | None = None

    def __str__(self) -> str:
        return str(self.file or f"lm-eval's {self.data.lm_eval}")

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self._rows[0][1]) if self._rows else []

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yield the rows one after the other."""
        yield from self._rows

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the data: everything that is asked, and what is right."""
        return sha256_of([row for _, row in self._rows])

    def beside(self, path: str) -> Path:
        """Refuse a path: there are no images."""
        raise InputError(f"{path!r}: a path but texts are expected.")

    @cached_property
    def _rows(self) -> list[Row]:
        task = self._task
        output = str(task.config.output_type)
        if KINDS.get(output) != self.kind:
            expected = KINDS.get(output)
            way = f"Set kind: {expected}." if expected else "Write its rows into a table."
            raise InputError(f"{self}: output_type {output} but the task is a {self.kind}. {way}")
        splits = {
            "train": task.training_docs() if task.has_training_docs() else None,
            "validation": task.validation_docs() if task.has_validation_docs() else None,
            "test": task.test_docs() if task.has_test_docs() else None,
        }
        if splits["test"] is None:  # as lm-eval evaluates
            splits["test"], splits["validation"] = splits["validation"], None
        found = {split: list(docs) for split, docs in splits.items() if docs is not None}
        if (count := sum(map(len, found.values()))) > MAX_ROWS:
            raise InputError(f"{self}: {count} rows but at most {MAX_ROWS} are read.")
        # Without rows to draw the others from, all are drawn from what there is.
        has_splits = "train" in found and len(found) > 1
        rows = []
        for split, docs in found.items():
            for number, doc in enumerate(docs, start=1):
                row = {**self._row(task, doc), **({"split": split} if has_splits else {})}
                rows.append((f"{split} document {number}", row))
        return rows

    def _row(self, task: Any, doc: Any) -> dict[str, Any]:
        try:
            if self.kind == "language_modelling":
                return {"text": str(task.doc_to_target(doc))}
            row = {"text": task.doc_to_text(doc), "answer": task.doc_to_target(doc)}
            if self.kind == "multiple_choice":
                row["choices"] = list(task.doc_to_choice(doc))
        except Exception as error:  # of the task's templates and functions
            raise InputError(f"{self}: {type(error).__name__}: {error}. Correct it.") from error
        if not isinstance(row["text"], str) or isinstance(row["answer"], list):
            raise InputError(
                f"{self}: several prompts or answers a document but one is expected. Write its "
                "rows into a table."
            )
        if self.kind == "generation":
            row["answer"] = str(row["answer"])
        return row

    @cached_property
    def _task(self) -> Any:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] - an extra

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        name = str(self.file or self.data.lm_eval)
        try:
            manager = TaskManager(include_defaults=self.file is None)
            # By a name alone: lm-eval would take any other text for a file, and run it.
            is_known = self.file is not None or name in manager.all_tasks
            tasks = manager.load([name])["tasks"] if is_known else None
        except Exception as error:  # the library raises dozens of unrelated types
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise InputError(f"{self}: cannot be loaded ({reason}). Check it.") from None
        if tasks is None:
            raise InputError(f"{self}: no task of that name. A file's ends in .yaml.")
        if len(tasks) != 1:
            raise InputError(
                f"{self}: a group of {len(tasks)} tasks but one is expected. Name each by itself."
            )
        return next(iter(tasks.values()))


def open_lm_eval(folder: Path, where: str, data: LmEvalData, kind: TaskKind) -> LmEvalSource:
    """Return a task of lm-eval by its name, or of a YAML file in the suite's folder.

    Raises:
        InputError: lm-eval is not installed, or there is no such file.
        RecipeError: a file, whose templates and functions are code, and nobody allowed code.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            f"{where}: a task of lm-eval but lm_eval is not installed. Run pip install "
            "'icm-ray[lm_eval]'."
        )
    if not data.lm_eval.endswith(ENDINGS):
        return LmEvalSource(data, kind)
    file = folder / data.lm_eval
    if not file.is_file():
        raise InputError(f"{where}: {file}: no such file. Check the path.")
    if not is_allowed():
        raise RecipeError(
            f"{where}: {data.lm_eval} has templates and functions that lm-eval runs, and nobody "
            "has allowed it. Read the file; then set allow_code: true in the recipe."
        )
    return LmEvalSource(data, kind, file.absolute())
