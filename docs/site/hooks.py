"""What becomes of a page's links on the site. The pages are written to be read in the repository too.

A link to a file outside docs/ goes to the repository, whose address is `Repository` in pyproject.toml. A picture outside
docs/ is copied into the site. A link that is named after its file, as [losses.md](…), gets the title of that page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
PICTURES = "pictures"  # the site's folder for those outside docs/


def repository() -> str:
    (url,) = re.findall(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return str(url)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.repo_url = repository()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in list(files.documentation_pages()):
        for picture, _, target, _ in LINK.findall(file.content_string):
            path = _path(file, target)
            uri = f"{PICTURES}/{path}"
            if picture and path is not None and not path.startswith("docs/") and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    code = FENCE.findall(markdown)
    prose = FENCE.split(markdown)
    prose = [LINK.sub(lambda link: _link(page.file, link), text) for text in prose]
    return "".join(part for pair in zip(prose, [*code, ""], strict=True) for part in pair)


def _path(file: File, target: str) -> str | None:
    """The path in the repository of what a page links to; None for addresses."""
    if "://" in target or target.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), target))


def _link(file: File, link: re.Match[str]) -> str:
    picture, text, target, anchor = link.groups(default="")
    path = _path(file, target)
    if path is None or not (ROOT / path).exists():  # mkdocs says what is missing
        return link[0]
    if path.startswith("docs/"):
        if text == posixpath.basename(path) or text == path:
            text = _title(ROOT / path)
        return f"{picture}[{text}]({target}{anchor})"
    if picture:
        return f"![{text}]({posixpath.relpath(f'docs/{PICTURES}/{path}', posixpath.dirname(f'docs/{file.src_uri}'))})"
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"[{text}]({repository()}/{kind}/main/{path}{anchor})"


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
