"""The site: no page is missing, no link is dead, and `make docs` builds it."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from launches import REPOSITORY

import fastkl.loss

DOCS = REPOSITORY / "docs"
SITE = DOCS / "site"
PAGES = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("recipes/**/*.md")])


def named(entries: Any) -> Iterator[str]:
    """The files of a nav."""
    if isinstance(entries, str):
        yield entries
    else:
        for entry in entries.values() if isinstance(entries, dict) else entries:
            yield from named(entry)


def test_the_nav_has_every_page_once() -> None:
    nav = list(named(yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(nav) == sorted(PAGES)


def anchors(document: Path) -> set[str]:
    """The ids of a document's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_to_headings_that_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", document.read_text(encoding="utf-8"))
    local = [(document.parent / file if file else document, anchor) for file, anchor in links if "://" not in file]
    assert [f"{file}#{anchor}" for file, anchor in local if anchor not in anchors(file)] == []


def test_the_api_page_has_every_name_of_the_losses() -> None:
    shown = re.findall(r"^::: fastkl\.loss\.(\w+)$", (DOCS / "losses/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    public = {name for name, value in vars(fastkl.loss).items() if inspect.isfunction(value) or inspect.isclass(value)}
    assert sorted(shown) == sorted(public)


def docstrings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_docstrings", SITE / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_columns_of_a_docstring_become_a_list() -> None:
    shown = docstrings().markdown("What:\n    z = a        b\n\nname       one\n           two\na, b   three\nAfter.")
    assert shown == "What:\n\n    z = a        b\n\n\n`name`\n:   one\n    two\n\n`a, b`\n:   three\n\nAfter.\n"


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", SITE / "mkdocs.yml", "--site-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {str(page.parent.relative_to(tmp_path)) for page in tmp_path.rglob("index.html")}
    assert built == {page.removesuffix(".md").removesuffix("README") or "." for page in PAGES}
