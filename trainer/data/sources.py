"""Where rows stand: files, folders of files, and data sets of the `datasets` package."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastkl.trainer.config.data import BESIDE, COLUMNS, DataConfig
from fastkl.trainer.data.formats.arrow import check_no_split, hub_rows, is_saved, parquet_rows, saved_rows
from fastkl.trainer.data.formats.json_files import json_rows
from fastkl.trainer.data.formats.packed import Packed
from fastkl.trainer.data.rows import Prompt, parse_row
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.notes import note

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")  # read from a folder

_CONVERT = "convert it to JSON Lines or Parquet"
OTHER_FILES = {
    ".csv": f"a CSV file; {_CONVERT}",
    ".tsv": f"a TSV file; {_CONVERT}",
    ".xlsx": f"an Excel file; {_CONVERT}",
    ".yaml": f"a YAML file; {_CONVERT}",
    ".yml": f"a YAML file; {_CONVERT}",
    ".arrow": f"an Arrow file; give the folder that save_to_disk wrote, or {_CONVERT}",
    ".feather": f"a Feather file; {_CONVERT}",
    ".pkl": f"a pickle; {_CONVERT}",
    ".bz2": "compressed by bzip2; unpack it",
    ".xz": "compressed by xz; unpack it",
    ".zst": "compressed by Zstandard; unpack it",
    ".zip": "a ZIP archive; unpack it",
    ".tar": "a tar archive; unpack it",
    ".tgz": "a tar archive; unpack it",
}


def load_prompts(config: DataConfig, more: Collection[str] = (), *, all_columns: bool = False) -> Packed[Prompt]:
    """The rows of a file, a folder or a data set, each checked; an error names the row.

    Columns in `more`, or all, are kept beside the usual ones. Those that nothing reads are named once, on stderr.
    """
    prompts, unused = Packed[Prompt](), dict[str, None]()
    last = None if config.limit is None else config.offset + config.limit
    for source, row in itertools.islice(_rows(config), config.offset, last):
        if isinstance(row, dict):
            row = _renamed(source, row, config.columns)
            unused |= dict.fromkeys(name for name in row if name not in (*COLUMNS, *BESIDE, *more))
        prompts.append(parse_row(source, row, list(row) if all_columns and isinstance(row, dict) else more))
    if not prompts:
        after = f" after the first {config.offset}, which data.offset skips" if config.offset else ""
        raise ConfigError(f"{config.path or config.dataset} holds no rows{after}")
    if unused and not all_columns:
        note(f"{config.path or config.dataset}: nothing reads the columns {', '.join(map(repr, unused))}")
    return prompts


def _rows(config: DataConfig) -> Iterable[tuple[str, Any]]:
    if config.path is None:
        return hub_rows(config)
    path = Path(os.path.expandvars(config.path)).expanduser()
    if is_saved(path):
        return saved_rows(path, config.split)
    check_no_split(path, config.split)
    if path.is_dir():
        return _folder_rows(path)
    if not path.is_file():
        raise ConfigError(f"data file {path} does not exist (looked in {Path.cwd()})")
    return _file_rows(path)


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for suffix, kind in OTHER_FILES.items():
        if path.name.lower().removesuffix(".gz").endswith(suffix):
            raise ConfigError(f"{path} is {kind}")
    return parquet_rows(path) if path.suffix.lower() == ".parquet" else json_rows(path)


def _folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(SUFFIXES))
    if not files:
        raise ConfigError(
            f"data.path {folder} is a folder without data; expected files {', '.join(SUFFIXES)}, or what save_to_disk "
            f"wrote (looked in {Path.cwd()})"
        )
    return itertools.chain.from_iterable(map(_file_rows, files))


def _renamed(source: str, row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A row under our names, from `data.columns` (ours: theirs)."""
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        raise ConfigError(f"{source} has no column {missing[0]!r}, which data.columns names; it has {sorted(row)}")
    taken = {*columns, *columns.values()}
    return {name: value for name, value in row.items() if name not in taken} | {
        ours: row[theirs] for ours, theirs in columns.items()
    }
