"""PEFT's own folder, whole or in shards with an index."""

from pathlib import Path

from icm_ray.adapters.formats.shards import INDEX_ENDING, attempt, read_shards
from icm_ray.adapters.formats.view import View
from icm_ray.adapters.header import read_header
from icm_ray.adapters.policy import CONFIG_FILE, MAX_CONFIG_BYTES
from icm_ray.adapters.raw_files import read_table

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = f"adapter_model{INDEX_ENDING}"


def read_folder(folder: Path) -> View:
    """Read config and header of a PEFT folder; a problem of one does not hide the other's."""
    problems: list[str] = []
    file = folder / WEIGHTS_FILE
    return View(
        format="PEFT",
        file=file,
        config=attempt(lambda: read_table(folder / CONFIG_FILE, MAX_CONFIG_BYTES), problems),
        header=attempt(lambda: read_header(file), problems),
        config_file=folder / CONFIG_FILE,
        problems=tuple(problems),
    )


def read_sharded(folder: Path) -> View:
    """Read config, index and every shard's header of a PEFT folder."""
    problems: list[str] = []
    index = folder / INDEX_FILE
    config = attempt(lambda: read_table(folder / CONFIG_FILE, MAX_CONFIG_BYTES), problems)
    header, stored = attempt(lambda: read_shards(index), problems) or (None, {})
    return View(
        format="PEFT, sharded",
        file=index,
        config=config,
        header=header,
        stored=stored,
        config_file=folder / CONFIG_FILE,
        problems=tuple(problems),
    )
