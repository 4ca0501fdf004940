"""Where a task's rows are: a table of JSON lines or Parquet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from icm_ray.errors import InputError
from icm_ray.files import sha256_of_file
from icm_ray.suites.rows import Row, json_rows, table_rows, table_schema

ENDINGS = (".jsonl", ".parquet")
MAX_IMAGE_BYTES = 50_000_000


@dataclass(frozen=True)
class Source:
    """A file of rows."""

    file: Path

    def __str__(self) -> str:
        return str(self.file)

    @cached_property
    def columns(self) -> list[str]:
        """Names of all columns; of JSON lines every key that occurs."""
        if self.file.suffix == ".parquet":
            return list(table_schema(self.file).names)
        return list(dict.fromkeys(key for _, row in json_rows(self.file) for key in row))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yield the rows one after the other, with some columns at least."""
        if self.file.suffix == ".parquet":
            return table_rows(self.file, columns, nested=True)
        return json_rows(self.file)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of its bytes."""
        return sha256_of_file(self.file)

    def beside(self, path: str) -> Path:
        """Return the file that a row names, in the table's folder or below."""
        folder = self.file.parent.resolve()
        place = (folder / path).resolve()
        if not place.is_relative_to(folder) or not place.is_file():
            raise InputError(
                f"{path!r}: no file in the table's folder but an image is expected. Put it there."
            )
        if place.stat().st_size > MAX_IMAGE_BYTES:
            raise InputError(f"{path!r}: over {MAX_IMAGE_BYTES} bytes. Give a smaller image.")
        return place


def find_table(folder: Path, task: str, data: str | None) -> Source:
    """Return the table of a task: the one that is named, else `<task>.jsonl` or `.parquet`.

    Raises:
        InputError: there is none, or there are two.
    """
    names = [data] if data is not None else [f"{task}{ending}" for ending in ENDINGS]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) == 1 and found[0].suffix in ENDINGS:
        return Source(found[0])
    if found and found[0].suffix not in ENDINGS:
        raise InputError(f"{found[0]}: {found[0].suffix} but {' or '.join(ENDINGS)} is expected.")
    if found:
        raise InputError(
            f"{folder}: both {' and '.join(names)}. Remove one, or name it with data:."
        )
    raise InputError(f"{folder / names[0]}: no such table. Write it, or name another with data:.")
