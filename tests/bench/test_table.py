"""The tables of the documents are those that the committed reports give."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_cases import bench_refusal

from bench.__main__ import main
from bench.commands.table import TABLES, documents, with_tables


@pytest.mark.parametrize("document", documents(), ids=lambda document: document.name)
def test_documents_have_the_figures_of_the_reports(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m bench table --write"


def test_every_table_stands_in_a_document() -> None:
    texts = [document.read_text(encoding="utf-8") for document in documents()]
    assert [name for name in TABLES if not any(f"<!-- table {name} -->" in text for text in texts)] == []


def test_what_stands_between_the_markers_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    main(["table", "losses"])
    name, table = capsys.readouterr().out.split("\n\n", 1)
    assert name == "losses"
    before = "Text.\n<!-- table losses -->\n| old |\n<!-- end -->\nMore."
    assert with_tables(before) == f"Text.\n<!-- table losses -->\n{table.removesuffix(chr(10))}<!-- end -->\nMore."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table losses -->\n| old |\n", "but 0 with a line '<!-- end -->'"),
        ("<!-- table none -->\n<!-- end -->\n", "unknown table none; known are ahead-overlap, "),
    ],
)
def test_bad_markers(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_tables(text)


def test_an_unknown_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument NAME: unknown table 'none'; use some of ahead-overlap, " in bench_refusal(capsys, "table", "none")
