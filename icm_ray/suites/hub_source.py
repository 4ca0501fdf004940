"""A data set of the Hugging Face hub, or a local copy of one, as a table with a `split` column."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from icm_ray.config import HubData
from icm_ray.errors import InputError
from icm_ray.files import sha256_of, sha256_of_file
from icm_ray.suites.bases import default_cache
from icm_ray.suites.rows import MAX_ROWS, Row

SPLIT = "split"


@dataclass(frozen=True)
class HubSource:
    """Rows of a data set; those of all its splits, one after the other.

    Attributes:
        data: Name, revision and subset.
        local: Its folder, if it is a local copy.
    """

    data: HubData
    local: Path | None = None

    def __str__(self) -> str:
        return str(self.local or self.data.hub)

    @cached_property
    def columns(self) -> list[str]:
        """Names of all columns."""
        names = [name for one in self._splits.values() for name in one.column_names]
        return list(dict.fromkeys([*names, SPLIT]))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yield the rows one after the other, with some columns at least."""
        for split, one in self._splits.items():
            wanted = [name for name in one.column_names if name in columns]
            for number, row in enumerate(one.select_columns(wanted) if wanted else one, start=1):
                yield f"{split} row {number}", {**row, SPLIT: row.get(SPLIT, split)}

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the data: the revision, or the local files' bytes."""
        said = self.data.model_dump()
        if self.local is None:
            return sha256_of(said)
        files = sorted(path for path in self.local.rglob("*") if path.is_file())
        hashes = [[str(p.relative_to(self.local)), sha256_of_file(p)] for p in files]
        return sha256_of([said, hashes])

    def beside(self, path: str) -> Path:
        """Refuse a path: a data set's images are bytes."""
        raise InputError(f"{path!r}: a path but an image's bytes are expected.")

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """Open the data set; no code of it is run, and images stay as they are stored."""
        import datasets  # pyright: ignore[reportMissingImports] - an extra

        try:
            found: Any = datasets.load_dataset(
                str(self.local or self.data.hub),
                name=self.data.config,
                revision=None if self.local else self.data.revision,
                cache_dir=str(default_cache() / "datasets"),
            )
        except Exception as error:  # the library raises dozens of unrelated types
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise InputError(
                f"{self}: no readable data set ({reason}). Check name, revision and network."
            ) from None
        if (count := sum(map(len, found.values()))) > MAX_ROWS:
            raise InputError(f"{self}: {count} rows but at most {MAX_ROWS} are read.")
        for split, one in found.items():
            for name, feature in one.features.items():
                if isinstance(feature, datasets.Image):
                    found[split] = found[split].cast_column(name, datasets.Image(decode=False))
        return dict(found)


def open_hub(folder: Path, where: str, data: HubData) -> HubSource:
    """Return a data set by its id and revision, or a local copy in the suite's folder.

    Raises:
        InputError: what opens it is not installed, or no revision is named.
    """
    local = folder / data.hub
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            f"{where}: a data set of the hub but datasets is not installed. Run pip install "
            "'icm-ray[datasets]'."
        )
    if not local.is_dir() and data.revision is None:
        raise InputError(f"{where}.revision: missing. Name a commit, so that the rows stay.")
    return HubSource(data, local if local.is_dir() else None)
