"""The rooms of the project: who imports whom, and how full they are."""

from __future__ import annotations

import ast
import itertools
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import REPOSITORY

PACKAGES = {"fastkl.kernels": "kernels", "fastkl.trainer": "trainer", "fastkl": "fastkl"}  # module, folder; inner first
MOST_ENTRIES = 16
UNLIMITED = ("bench/results",)  # measurements

Imports = dict[str, dict[str, str]]  # a room, the rooms that it imports, and where


def location(module: str) -> Path | None:
    """The file of one of our modules, or of the module that a name is in; None for other people's."""
    for package, folder in PACKAGES.items():
        if module == package or module.startswith(f"{package}."):
            path = Path(folder, *module.removeprefix(package).split(".")[1:])
            candidates = (path.with_suffix(".py"), path.parent.with_suffix(".py"), path / "__init__.py")
            return next((file for file in candidates if (REPOSITORY / file).is_file()), None)
    return None


def room(file: Path) -> str:
    """The folder of a file; at the top of a package, the file itself."""
    return str(file.with_suffix("") if file.parent.name in PACKAGES.values() else file.parent)


def imported(file: Path) -> Iterator[tuple[Path, int]]:
    """Our files that a file imports, anywhere in it but under TYPE_CHECKING, and the lines."""
    nodes: list[ast.AST] = [ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found = location(name)
            if found is not None:
                yield found, node.lineno  # type: ignore[attr-defined]


def imports() -> Imports:
    found: Imports = defaultdict(dict)
    for folder in PACKAGES.values():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            file = path.relative_to(REPOSITORY)
            if file.parts[:2] in (("fastkl", "kernels"), ("fastkl", "trainer")):  # links to the rooms
                continue
            for other, line in imported(file):
                if room(other) != room(file):
                    found[room(file)].setdefault(room(other), f"{file}:{line}")
    return found


IMPORTS = imports()


def cycle(graph: Imports) -> list[str]:
    """The rooms of one cycle, the first of them again at the end; empty without one."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in graph.get(name, {}):
                found = walk(other, [*path, name])
                if found:
                    return found
            done.add(name)
        return []

    return next((found for name in list(graph) if (found := walk(name, []))), [])


def test_no_rooms_import_each_other_in_a_circle() -> None:
    found = cycle(IMPORTS)
    steps = [f"{one} -> {other} ({IMPORTS[one][other]})" for one, other in itertools.pairwise(found)]
    assert not found, "\n".join(steps)


def test_a_circle_is_found() -> None:
    graph: Imports = {"a": {"b": ""}, "b": {"c": "", "d": ""}, "c": {}, "d": {"b": ""}}
    assert cycle(graph) == ["b", "d", "b"]
    assert cycle({"a": {"b": "", "c": ""}, "b": {"c": ""}}) == []


def test_the_imports_are_seen() -> None:
    assert "trainer/config" in IMPORTS["trainer/distill"]
    assert "kernels/divergence" in IMPORTS["fastkl/_loss"]
    assert any(name.startswith("trainer") for name in IMPORTS["fastkl/cli"])  # inside a function


def test_kernels_know_nothing_of_what_is_built_on_them() -> None:
    others = {name: where for one in IMPORTS if one.startswith("kernels") for name, where in IMPORTS[one].items()}
    assert [(name, where) for name, where in others.items() if not name.startswith("kernels")] == []


def test_the_losses_know_nothing_of_the_trainer() -> None:
    theirs = {one: names for one, names in IMPORTS.items() if one.startswith("fastkl") and one != "fastkl/cli"}
    found = [where for names in theirs.values() for name, where in names.items() if name.startswith("trainer")]
    assert found == []


def folders() -> dict[str, set[str]]:
    """What git has in each folder."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    entries: dict[str, set[str]] = defaultdict(set)
    for file in map(Path, listed.splitlines()):
        for path in (file, *file.parents[:-1]):
            entries[str(path.parent)].add(path.name)
    return entries


def test_a_bare_name_is_one_helper() -> None:
    names = [path.stem for path in (REPOSITORY / "tests/support").rglob("*.py")]
    assert sorted(set(names)) == sorted(names)
    assert "launches" in names


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="no git repository")
def test_a_folder_is_read_at_a_glance() -> None:
    full = {name: len(entries) for name, entries in folders().items() if len(entries) > MOST_ENTRIES}
    assert {name: count for name, count in full.items() if name not in UNLIMITED} == {}
