"""The tables of README.md, docs/ and recipes/, made from the reports of benches and recipes by bench/tables/.

    python -m bench table                 prints all of them
    python -m bench table losses          prints one
    python -m bench table --write         writes them into the documents

A document names a table where it stands: `<!-- table NAME -->`, the table, `<!-- end -->`. What is between is replaced.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import bench.tables

SOURCES = [import_module(f"bench.tables.{found.name}") for found in iter_modules(bench.tables.__path__)]
TABLES = {name: table for source in SOURCES for name, table in source.TABLES.items()}
ROOT = Path(__file__).parents[2]
START = "<!-- table "
MARKED = re.compile(rf"({START}(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"print these only: {', '.join(TABLES)}")
    parser.add_argument("--write", action="store_true", help="write the tables into README.md, docs/ and recipes/")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.write:
        _write_documents(parser)
        return
    for name in arguments.names or TABLES:
        if name not in TABLES:
            parser.error(f"argument NAME: unknown table {name!r}; use some of {', '.join(TABLES)}")
        print(f"{name}\n\n{TABLES[name]()}")


def documents() -> list[Path]:
    """Where tables may stand."""
    return [ROOT / "README.md", *(path for room in ("docs", "recipes") for path in sorted((ROOT / room).rglob("*.md")))]


def with_tables(text: str) -> str:
    """The text of a document with its tables made anew.

    Raises:
        ValueError: When a marker has no end, or names no table.
    """
    marked = MARKED.findall(text)
    if len(marked) != text.count(START):
        raise ValueError(f"{text.count(START)} × {START!r} but {len(marked)} with a line '<!-- end -->' after it")
    unknown = {name for _, name, _ in marked} - set(TABLES)
    if unknown:
        raise ValueError(f"unknown table {', '.join(sorted(unknown))}; known are {', '.join(TABLES)}")
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def _write_documents(parser: argparse.ArgumentParser) -> None:
    for document in documents():
        before = document.read_text(encoding="utf-8")
        try:
            after = with_tables(before)
        except ValueError as error:
            parser.error(f"{document.relative_to(ROOT)}: {error}")
        if after != before:
            document.write_text(after, encoding="utf-8")
            print(document.relative_to(ROOT))
