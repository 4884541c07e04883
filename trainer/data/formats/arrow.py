"""Rows of Arrow tables: Parquet files, folders of `save_to_disk`, data sets of the `datasets` package."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.errors import ConfigError, require
from fastkl.trainer.notes import printable

AT_ONCE = 1024  # rows of a table that are Python objects together
NESTED = ("prompt", "messages", "completion", "tools")  # a table fills the keys that only other rows have with null


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_rows(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a saved data set; of several splits, those of one."""
    datasets = _package("datasets", f"data.path {folder} is a folder of save_to_disk")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder: whatever Arrow and datasets raise
        raise ConfigError(f"data.path {folder} could not be loaded: {_sentence(error)}") from error
    if not isinstance(found, dict):
        check_no_split(folder, split)
        return _numbered(str(folder), found)
    if split not in found:
        raise ConfigError(f"data.split is {split!r}, but {folder} has the splits {', '.join(map(repr, found))}")
    return _numbered(f"{folder}[{split}]", found[split])


def check_no_split(path: Path, split: str) -> None:
    require(split == "train", f"data.split is {split!r}, but {path} has no splits; unset it")


def hub_rows(config: DataConfig) -> Iterator[tuple[str, Any]]:
    """The rows of `data.dataset`, a data set of the Hub or a folder that `datasets.load_dataset` understands."""
    named = f"data.dataset is {config.dataset!r}"
    if is_saved(Path(config.dataset or "")):
        raise ConfigError(f"{named}, a folder that save_to_disk wrote; name it in data.path instead")
    datasets = _package("datasets", named)
    name = [] if config.name is None else [config.name]
    try:
        found = datasets.load_dataset(config.dataset, *name, split=config.split)
    except Exception as error:  # of the Hub, of the network, of files, of Arrow
        raise ConfigError(
            f"{named}, which could not be loaded with data.name {config.name!r} and data.split {config.split!r}: "
            f"{_sentence(error)}; set them to what it has, or give data.path"
        ) from error
    return _numbered(f"{config.dataset}[{config.split}]", found)


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, named "file#17"."""
    _package("pyarrow", f"data.path {path} is a Parquet file")
    parquet = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}#{number}", _without_nulls(row)
    except (OSError, ValueError) as error:  # Arrow's errors are of these kinds
        raise ConfigError(f"{path} could not be read as Parquet: {_sentence(error)}") from error


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}:{number}", _without_nulls(row)) for number, row in enumerate(rows, start=1))


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _stripped(value) if key in NESTED else value for key, value in row.items()}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_stripped(inner) for inner in value]
    return value


def _package(name: str, reason: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{reason}, which needs the package `{name}`: pip install {name}, or give data.path, a JSONL file"
        ) from error


def _sentence(error: Exception) -> str:
    """What it says, on one line; escape sequences in it are spelled out."""
    text = " ".join(str(error).partition("\nExample of usage")[0].split()) or type(error).__name__
    return printable(text[:300])
