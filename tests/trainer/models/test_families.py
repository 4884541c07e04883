"""Every causal-LM family of Transformers that can be built small, through what a run does with its student.

The table is tests/support/models/family_table.py. Where this test fails with another result, the table and
docs/models/models.md are to be changed, or the trainer is to be mended.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from families import make_model
from family_checks import examine
from family_table import EXPECTED, GROUPS, LEFT_OUT, REFUSED_FAMILIES, page
from launches import REPOSITORY
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IN_EVERY_RUN = ("llama", "gpt2", "qwen3_moe")  # dense; dropout and learned positions; experts
INSTALLED = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *EXPECTED} - LEFT_OUT.keys())


def check(family: str, folder: Path) -> None:
    said = examine(make_model(family), folder)
    found = {column: "refused" if text.startswith("refused") else text for column, text in said.items()}
    if family in EXPECTED:
        assert found == EXPECTED[family], f"{family}: {said}"
    else:  # of a later Transformers: whatever works or is refused, nothing may be wrong
        faults = {column: text for column, text in found.items() if "wrong" in text or "Error" in text}
        assert not faults, f"{family}, which is not in the table: {said}"


@pytest.mark.parametrize("family", IN_EVERY_RUN)
def test_a_family(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in INSTALLED if family not in IN_EVERY_RUN])
def test_every_family(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


def test_every_family_has_one_place() -> None:
    names = [name for group in GROUPS for name in group.names] + [*REFUSED_FAMILIES, *LEFT_OUT]
    assert len(names) == len(set(names))


def test_the_document_is_made_from_the_table() -> None:
    text = (REPOSITORY / "docs" / "models" / "models.md").read_text(encoding="utf-8")
    assert text == "\n".join(page()) + "\n", "run: python tests/support/models/family_table.py > docs/models/models.md"
