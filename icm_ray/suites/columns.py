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
from icm_ray.inputs import PLACE, Pair, Prompt, Question, Text, Turn
from icm_ray.suites.answers import Wrong, answer_of, text_of
from icm_ray.suites.values import (
    Image,
    choices_of,
    image_of,
    images_of,
    placed,
    turns_of,
    word_of,
)

USUAL = ("text", "text_pair", "choices", "answer", "target", "document", "split")
LOOKALIKES = ("label", "labels", "class", "score", "value", "y", "output", "response")
"""Names that mean an answer elsewhere; to read such a table as unlabelled would be a loss."""

Turns = tuple[Turn, ...]


class Record(NamedTuple):
    """One row, as it is kept.

    Attributes:
        where: Where it stands, in words.
        split: What its column says; None without one.
        document: What it was cut from.
        asked: What a model reads: a text, a pair, a prompt, or an image's bytes or path.
        answer: A class's name or index, a number, a text or a list of numbers; None without one.
        images: What stands at the places of a prompt.
    """

    where: str
    split: str | None
    document: str
    asked: Text | bytes
    answer: Any
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Which columns of a table a task reads.

    Attributes:
        task: What suite.yaml says.
        names: Column by role; roles without one are left out.
        fields: Columns of the prompt's template, in its order.
        images: Columns of images.
    """

    task: TaskFile
    names: Mapping[str, str]
    fields: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    @property
    def read(self) -> list[str]:
        """Every column that is looked at."""
        every = [*self.names.values(), *self.fields, *self.images, *self.task.where]
        return list(dict.fromkeys(every))

    @property
    def shows(self) -> bool:
        """Whether an image is all that a model reads."""
        return bool(self.images) and self.task.prompt is None and "messages" not in self.names

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Say whether a row is the task's."""
        return all(row.get(name) == value for name, value in self.task.where.items())

    def record(self, where: str, row: Mapping[str, Any], problems: list[str]) -> Record | None:
        """Return a row's record; None, and why, if a value is wrong."""
        before = len(problems)
        read = self._tried(problems, lambda: self._asked(row))
        answer = self._tried(problems, lambda: self._answer(row))
        document, split = (
            self._tried(problems, lambda role=role: self._word(row, role))
            for role in ("document", "split")
        )
        if len(problems) > before:
            return None
        asked, images = read
        if document is None:
            inputs: Any = asked.turns if isinstance(asked, Prompt) else asked
            document = repr((inputs, images) if images else inputs)
        return Record(where, split, document, asked, answer, images)

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

    def _asked(self, row: Mapping[str, Any]) -> tuple[Text | bytes, tuple[Image, ...]]:
        """Return what a model reads, and the images at its places."""
        if self.shows:
            return image_of(self.images[0], row.get(self.images[0])), ()
        if "text" in self.names:
            return self._text(row), ()
        turns, said, images = self._turns(row)
        choices: tuple[str, ...] = ()
        if self.task.kind == "multiple_choice":
            name = self.names["choices"]
            choices = tuple(choices_of(name, row.get(name)))
        chat = self.task.chat or "messages" in self.names
        if self.is_said:
            return Prompt(turns, chat, said or None), images
        room = self.task.max_new_tokens if self.task.kind == "generation" else 0
        return Prompt(turns, chat, choices=choices, room=room), images

    def _text(self, row: Mapping[str, Any]) -> Text:
        text = text_of(self.names["text"], row.get(self.names["text"]))
        if "text_pair" in self.names:
            return Pair(text, text_of(self.names["text_pair"], row.get(self.names["text_pair"])))
        asks = self.task.kind == "generation"
        return Question(text, self.task.max_new_tokens) if asks else text

    def _turns(self, row: Mapping[str, Any]) -> tuple[Turns, str | None, tuple[Image, ...]]:
        """Return the turns before the answer, the answer if it is one of them, and the images."""
        columns = {name: images_of(name, row.get(name)) for name in self.images}
        if "messages" in self.names:
            name = self.names["messages"]
            turns, images = turns_of(name, row.get(name))
            turns, said = self._parted(name, turns)
            beside = [image for own in columns.values() for image in own]
            return turns, said, placed(name, turns, images, beside)
        values = {
            name: PLACE * len(columns[name]) if name in columns else word_of(name, row.get(name))
            for name in self.fields
        }
        turns = (Turn("user", (self.task.prompt or "").format(**values)),)
        images = tuple(image for name in self.fields for image in columns.get(name, ()))
        said = self._said(row) if self.is_said else None
        return turns, said, placed("prompt", turns, images, ())

    def _parted(self, name: str, turns: Turns) -> tuple[Turns, str | None]:
        """Return a conversation without its last answer, and that answer if it ends so."""
        last = turns[-1]
        if last.role != "assistant" or self._answers_elsewhere:
            return turns, None
        if len(turns) == 1:
            raise Wrong(
                f"{name}: one turn of the assistant but a turn before it is expected. Mend or "
                "drop the line."
            )
        return turns[:-1], last.content

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
            _, said, _ = self._turns(row)
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
    images = tuple([task.image] if isinstance(task.image, str) else task.image or ())
    wanted = {**{role: [name] for role, name in names.items()}, "prompt": list(fields)}
    wanted |= {"image": list(images), "where": list(task.where)}
    for role, columns in wanted.items():
        problems += [
            f"{role}: no column {name!r}.{did_you_mean(name, known)} There are: {_listed(known)}."
            for name in columns
            if name not in known
        ]
    if not images and not {"text", "messages"} & set(names) and task.prompt is None:
        usual = next((role for role in ("text", "messages", "image") if role in known), None)
        if usual is None:
            problems.append(
                f"text: no column 'text'. There are: {_listed(known)}. Name the column with text:, "
                "prompt:, messages: or image:."
            )
        elif usual == "image":
            images = (usual,)
        else:
            names[usual] = usual
    if task.prompt is not None:
        problems += [
            f"prompt: no place for {name!r}, a column of images. Write {{{name}}} where they go."
            for name in images
            if name not in fields
        ]
    columns = Columns(task, names, fields, images)
    if task.kind == "detection" and not columns.shows:
        problems.append("image: a detection reads an image alone. Name its column with image:.")
    _add_usual(columns, known, names, problems)
    return columns


def _add_usual(
    columns: Columns, known: Sequence[str], names: dict[str, str], problems: list[str]
) -> None:
    """Add the columns that need no naming, and say which ones are missing."""
    task = columns.task
    for role in ("document", "split", *(["text_pair"] if "text" in names else [])):
        if role in known:
            names.setdefault(role, role)
    if task.kind == "multiple_choice":
        names.setdefault("choices", "choices")
        if task.choices is None and "choices" not in known:
            problems.append(
                f"choices: no column 'choices'. There are: {_listed(known)}. Name the column."
            )
        if columns.shows or "text" in names:
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) or "none"
