"""From a table's row to an example: which column is what, and what a value must be.

`columns_of` looks at names alone and says all that is wrong with them; `Columns.record` makes one
row's record, or says what is wrong with its values.
"""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from icm_ray.config import TaskFile
from icm_ray.errors import did_you_mean
from icm_ray.inputs import Pair, Prompt, Question, Text, Turn
from icm_ray.suites.answers import Wrong, answer_of, short, text_of

USUAL = ("text", "text_pair", "image", "choices", "answer", "target", "document", "split")
LOOKALIKES = ("label", "labels", "class", "score", "value", "y", "output", "response")
"""Names that mean an answer elsewhere; to read such a table as unlabelled would be a loss."""


class Record(NamedTuple):
    """One row, as it is kept.

    Attributes:
        where: Where it stands, in words.
        split: What its column says; None without one.
        document: What it was cut from.
        asked: What a model reads: a text, a pair, a prompt, or an image's bytes or path.
        answer: A class's name or index, a number, a text or a list of numbers; None without one.
    """

    where: str
    split: str | None
    document: str
    asked: Text | bytes
    answer: Any


@dataclass(frozen=True)
class Columns:
    """Which columns of a table a task reads.

    Attributes:
        task: What suite.yaml says.
        names: Column by role; roles without one are left out.
        fields: Columns of the prompt's template.
    """

    task: TaskFile
    names: Mapping[str, str]
    fields: tuple[str, ...] = ()

    @property
    def read(self) -> list[str]:
        """Every column that is looked at."""
        return list(dict.fromkeys([*self.names.values(), *self.fields, *self.task.where]))

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Say whether a row is the task's."""
        return all(row.get(name) == value for name, value in self.task.where.items())

    def record(self, where: str, row: Mapping[str, Any], problems: list[str]) -> Record | None:
        """Return a row's record; None, and why, if a value is wrong."""
        before = len(problems)
        asked = self._tried(problems, lambda: self._asked(row))
        answer = self._tried(problems, lambda: self._answer(row))
        document, split = (
            self._tried(problems, lambda role=role: self._word(row, role))
            for role in ("document", "split")
        )
        if len(problems) > before:
            return None
        if document is None:
            inputs: Any = asked.turns if isinstance(asked, Prompt) else asked
            document = repr(inputs)
        return Record(where, split, document, asked, answer)

    @property
    def is_said(self) -> bool:
        """Whether what follows a prompt is part of what the model reads."""
        return self.task.kind == "language_modelling" and "text" not in self.names

    @property
    def is_labelled(self) -> bool:
        """Whether a column may hold answers."""
        return not self.is_said and ("answer" in self.names or "messages" in self.names)

    def _tried(self, problems: list[str], make: Any) -> Any:
        try:
            return make()
        except Wrong as wrong:
            problems.append(str(wrong))
            return None

    def _asked(self, row: Mapping[str, Any]) -> Text | bytes:
        if "image" in self.names:
            return image_of(self.names["image"], row.get(self.names["image"]))
        if "text" in self.names:
            text = text_of(self.names["text"], row.get(self.names["text"]))
            if "text_pair" not in self.names:
                asks = self.task.kind == "generation"
                return Question(text, self.task.max_new_tokens) if asks else text
            return Pair(text, text_of(self.names["text_pair"], row.get(self.names["text_pair"])))
        turns, said = self._turns(row)
        choices: tuple[str, ...] = ()
        if self.task.kind == "multiple_choice":
            name = self.names["choices"]
            choices = tuple(choices_of(name, row.get(name)))
        chat = self.task.chat or "messages" in self.names
        if self.is_said:
            return Prompt(turns, chat, said or None)
        room = self.task.max_new_tokens if self.task.kind == "generation" else 0
        return Prompt(turns, chat, choices=choices, room=room)

    def _turns(self, row: Mapping[str, Any]) -> tuple[tuple[Turn, ...], str | None]:
        """Return the turns before the answer, and the answer if it is one of them."""
        if "messages" in self.names:
            turns = turns_of(self.names["messages"], row.get(self.names["messages"]))
            last = turns[-1]
            if last.role != "assistant" or self._answers_elsewhere:
                return turns, None
            if len(turns) == 1:
                raise Wrong(
                    f"{self.names['messages']}: one turn of the assistant but a turn before "
                    "it is expected. Mend or drop the line."
                )
            return turns[:-1], last.content
        values = {name: word_of(name, row.get(name)) for name in self.fields}
        text = (self.task.prompt or "").format(**values)
        return (Turn("user", text),), self._said(row) if self.is_said else None

    @property
    def _answers_elsewhere(self) -> bool:
        return "answer" in self.names

    def _said(self, row: Mapping[str, Any]) -> str | None:
        if "answer" not in self.names or row.get(self.names["answer"]) is None:
            return None
        return text_of(self.names["answer"], row[self.names["answer"]])

    def _answer(self, row: Mapping[str, Any]) -> Any:
        if self.is_said or self.task.kind == "language_modelling":
            return None
        if "answer" in self.names:
            name = self.names["answer"]
            value = row.get(name)
            choices = self.names.get("choices")
            known = row.get(choices) if choices and self.task.kind == "multiple_choice" else None
            return None if value is None else answer_of(self.task, name, value, known)
        if "messages" in self.names and self.task.kind != "multiple_choice":
            _, said = self._turns(row)
            name = self.names["messages"]
            return None if said is None else answer_of(self.task, name, said, None)
        return None

    def _word(self, row: Mapping[str, Any], role: str) -> str | None:
        if role not in self.names:
            return None
        return word_of(self.names[role], row.get(self.names[role]))


def columns_of(task: TaskFile, known: Sequence[str], problems: list[str]) -> Columns:
    """Return which columns a task reads of those a table has; `problems` gets what is wrong."""
    fields = tuple(_fields(task, problems))
    named = {role: getattr(task, role) for role in USUAL if role != "target"}
    named["messages"] = task.messages
    names = {role: name for role, name in named.items() if isinstance(name, str)}
    wanted = {**{role: [name] for role, name in names.items()}, "prompt": list(fields)}
    wanted["where"] = list(task.where)
    for role, columns in wanted.items():
        problems += [
            f"{role}: no column {name!r}.{did_you_mean(name, known)} There are: {_listed(known)}."
            for name in columns
            if name not in known
        ]
    if not {"text", "image", "messages"} & set(names) and task.prompt is None:
        usual = next((role for role in ("text", "messages", "image") if role in known), None)
        if usual is None:
            problems.append(
                f"text: no column 'text'. There are: {_listed(known)}. Name the column with text:, "
                "prompt:, messages: or image:."
            )
        else:
            names[usual] = usual
    _add_usual(task, known, names, problems)
    return Columns(task, names, fields)


def _add_usual(
    task: TaskFile, known: Sequence[str], names: dict[str, str], problems: list[str]
) -> None:
    """Add the columns that need no naming, and say which ones are missing."""
    for role in ("document", "split", *(["text_pair"] if "text" in names else [])):
        if role in known:
            names.setdefault(role, role)
    if task.kind == "multiple_choice":
        names.setdefault("choices", "choices")
        if task.choices is None and "choices" not in known:
            problems.append(
                f"choices: no column 'choices'. There are: {_listed(known)}. Name the column."
            )
        if {"text", "image"} & set(names):
            problems.append("kind: multiple_choice needs a prompt or messages. Set one of them.")
    if task.answer is None:
        usual = next((role for role in ("answer", "target") if role in known), None)
        if usual:
            names.setdefault("answer", usual)
        elif (near := [name for name in known if name.lower() in LOOKALIKES]) and (
            task.kind != "language_modelling"
            and "messages" not in names
            and near[0] not in names.values()
        ):
            problems.append(
                f"answer: no column 'answer' or 'target' but there is {near[0]!r}. Name it with "
                "answer:, or drop it if the data are unlabelled."
            )


def _fields(task: TaskFile, problems: list[str]) -> Iterator[str]:
    """Yield the columns of the prompt's template, in their order."""
    if task.prompt is None:
        return
    try:
        parts = list(string.Formatter().parse(task.prompt))
    except ValueError as error:
        problems.append(f"prompt: not a template ({error}). Write {{{{ for a brace.")
        return
    named = [(name, spec, convert) for _, name, spec, convert in parts if name is not None]
    if not named:
        problems.append("prompt: names no column. Write a column's name in braces: '{question}'.")
    for name, spec, convert in named:
        if not name or spec or convert or re.search(r"[.\[\]]", name) or name.isdigit():
            problems.append(
                f"prompt: {{{name}}} but the plain name of a column is expected: no attributes, no "
                "formats, no numbers. Write {{ for a brace."
            )
        else:
            yield name


def word_of(name: str, value: Any) -> str:
    """Return a short value as text: for templates, splits and documents."""
    if value is None:
        raise Wrong(f"{name}: null but a value is expected. Mend or drop the line.")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Wrong(f"{name}: {short(value)} but a text or number is expected. Mend the line.")
    return text_of(name, value, empty=True) if isinstance(value, str) else str(value)


def choices_of(name: str, value: Any) -> list[str]:
    """Return the texts to choose from."""
    if not isinstance(value, list) or len(value) < 2 or len(set(map(str, value))) < len(value):
        raise Wrong(
            f"{name}: {short(value)} but a list of two or more different texts is expected."
            " Mend or drop the line."
        )
    return [text_of(name, one) for one in value]


def turns_of(name: str, value: Any) -> tuple[Turn, ...]:
    """Return the turns of a conversation."""
    if not isinstance(value, list) or not value:
        raise Wrong(f"{name}: {short(value)} but a list of turns is expected. Mend the line.")
    turns = []
    for number, turn in enumerate(value):
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or not role:
            raise Wrong(
                f"{name}[{number}]: {short(turn)} but role and content are expected. Mend the line."
            )
        turns.append(Turn(role, _content(f"{name}[{number}].content", turn.get("content"))))
    return tuple(turns)


def _content(name: str, value: Any) -> str:
    if not isinstance(value, list):
        return text_of(name, value, empty=True)
    parts = [part if isinstance(part, dict) else {} for part in value]
    if any(part.get("type") != "text" for part in parts):
        raise Wrong(f"{name}: {short(value)} but texts are expected. Other parts are not read.")
    return "".join(text_of(name, part.get("text"), empty=True) for part in parts)


def image_of(name: str, value: Any) -> bytes | str:
    """Return an image's bytes, or its path beside the table."""
    if isinstance(value, dict):  # as the datasets library stores images
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, bytes | str) or not value:
        raise Wrong(
            f"{name}: {short(value)} but an image's bytes or path is expected. Mend the line."
        )
    return value


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) or "none"
