"""Rows of a user's data file, read one after the other and never all at once.

A table of 0.4 MB can decode to 4 GB, and a line can be longer than memory, so every row has a
limit and so has what is kept of them. What is no text is told with its line, where it is read.
"""

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icm_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROW_BYTES = 8_000_000
"""The longest line of a file or row of a table; a book of a million words has fewer."""
MAX_FILE_BYTES = 1_000_000_000
"""What all rows of one file may decode to."""
MAX_ROWS = 10_000_000
BATCH_ROWS = 512
"""Rows of a table that are decoded at once."""

Row = tuple[str, Mapping[str, Any]]
"""Where the row stands, in words, and its values."""


def json_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line; empty lines do not count.

    Raises:
        InputError: a line is too long, not UTF-8, or no JSON object; it is named.
    """
    total = 0
    with file.open("rb") as lines:
        # Not by str.splitlines, which would also cut at U+2028 inside a JSON string.
        for number in range(1, MAX_ROWS + 2):
            line = lines.readline(MAX_ROW_BYTES + 1)
            if not line:
                return
            total += len(line)
            where = f"line {number}"
            _check_size(f"{file}: {where}", len(line), total, number)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield where, _json_object(f"{file}: {where}", line)


def table_rows(file: Path, columns: Sequence[str], *, nested: bool = False) -> Iterator[Row]:
    """Yield the rows of a Parquet file, a few decoded at a time.

    Args:
        file: The file.
        columns: The columns to read, of those the file has; no other is decoded.
        nested: Whether a value may be a list or a table.

    Raises:
        InputError: no Parquet file, an unwanted nested column, or a row that is too long; it is
            named.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = table_schema(file)
    names = [name for name in schema.names if name in columns]
    for name in names:
        if pa.types.is_nested(schema.field(name).type) and not nested:
            raise InputError(
                f"{file}: column {name}: {schema.field(name).type} but texts or numbers are "
                "expected. Write plain values."
            )
    try:
        # As dictionaries: a value that is repeated a million times is held once.
        leaves = _leaves(pq.read_metadata(file), names)
        with pq.ParquetFile(file, read_dictionary=leaves) as reader:
            _check_footer(file, reader.metadata, leaves)
            batches = reader.iter_batches(BATCH_ROWS, columns=names)
            yield from _decoded(file, batches)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{file}: not a readable Parquet file ({reason}). Write it again."
        ) from None


def table_schema(file: Path) -> "pa.Schema":
    """Return the names and types of a Parquet file's columns.

    Raises:
        InputError: no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: not a readable Parquet file ({error}). Write it again."
        ) from None


def _check_size(where: str, row: int, total: int, count: int) -> None:
    if row > MAX_ROW_BYTES:
        raise InputError(
            f"{where}: over {MAX_ROW_BYTES} bytes but a shorter text is expected. Split or drop it."
        )
    if total > MAX_FILE_BYTES or count > MAX_ROWS:
        raise InputError(
            f"{where}: more than {MAX_FILE_BYTES} bytes or {MAX_ROWS} rows so far but fewer are "
            "expected. Give a sample."
        )


def _json_object(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start}: not UTF-8. Save the file as UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        other = "nested too deeply" if isinstance(error, RecursionError) else "a number too long"
        reason = getattr(error, "msg", other)
        raise InputError(f"{where}: not JSON ({reason}). Write one JSON object per line.") from None
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: a {type(row).__name__} but expected an object. Write one JSON object per "
            'line, as {"text": "...", "target": 0}.'
        )
    return row


def _leaves(metadata: Any, names: Sequence[str]) -> list[str]:
    """Return the paths of what is stored of some columns; a nested one has several, or another."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return [path for path in paths if path in names or path.partition(".")[0] in names]


def _check_footer(file: Path, metadata: Any, names: list[str]) -> None:
    """Refuse by its footer a table that is too large; what the footer hides is found on the way."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    total = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in names)
    _check_size(str(file), 0, total, metadata.num_rows)


def _decoded(file: Path, batches: Iterator["pa.RecordBatch"]) -> Iterator[Row]:
    number = total = 0
    for batch in batches:
        sizes = [0] * batch.num_rows
        for column in batch.columns:
            sizes = [size + more for size, more in zip(sizes, _sizes(column), strict=True)]
        for size in sizes:  # all of them before any is decoded
            number += 1
            total += size
            _check_size(f"{file}: row {number}", size, total, number)
        first = number - batch.num_rows + 1
        for offset, row in enumerate(batch.to_pylist()):
            yield f"row {first + offset}", row


def _sizes(column: "pa.Array") -> list[int]:
    """Return how many bytes each value decodes to; a dictionary's values are stored once."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.DictionaryArray):
        lengths = _sizes(column.dictionary)
        return [0 if i is None else lengths[i] for i in column.indices.to_pylist()]
    kind = column.type
    if pa.types.is_struct(kind):
        parts = [_sizes(column.field(place)) for place in range(kind.num_fields)]
        return [sum(sizes) for sizes in zip(*parts, strict=True)] if parts else [0] * len(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inside = iter(_sizes(column.flatten()))
        lengths = pc.call_function("list_value_length", [column]).to_pylist()
        return [8 + sum(islice(inside, length or 0)) for length in lengths]
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind)):
        return [8] * len(column)
    return [length or 0 for length in pc.call_function("binary_length", [column]).to_pylist()]
