"""docs/data/data.md: its examples are rows, and it names every column, suffix and setting."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from launches import REPOSITORY
from tiny_data import write_jsonl
from tiny_models import tokenizer

from fastkl.trainer.config.data import COLUMNS, DataConfig
from fastkl.trainer.data.prompts import encode_prompts
from fastkl.trainer.data.sources import load_prompts

PAGE = (REPOSITORY / "docs" / "data" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```json\n(.*?)\n```", PAGE, flags=re.MULTILINE | re.DOTALL)
# Takes whatever the page shows.
TEMPLATE = (
    "{{ tools | tojson }}{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}"
)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_are_rows(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE.replace("m.tool_calls", "(m.tool_calls or [])")
    (row,) = load_prompts(DataConfig(path=str(write_jsonl(tmp_path / "d.jsonl", [json.loads(example)]))))
    assert capsys.readouterr().err == ""
    assert "It is 4." not in str(row.prompt)
    assert (row.completion or "It is 4.") == "It is 4."
    assert encode_prompts([row], words, DataConfig(path="d"))[0].ids


def test_the_page_is_complete() -> None:
    assert {name for example in EXAMPLES for name in json.loads(example)} == {*COLUMNS}
    for field in dataclasses.fields(DataConfig):
        assert re.search(rf"\b{field.name}\b", PAGE), field.name
