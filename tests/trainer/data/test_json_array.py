"""An array that is read a piece at a time has the entries that `json` finds in the whole, and the same faults."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkl.trainer.data.formats import json_array
from fastkl.trainer.data.formats.json_array import entries
from fastkl.trainer.data.formats.json_files import json_rows

ATOMS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
VALUES = ATOMS | st.lists(ATOMS, max_size=2) | st.dictionaries(st.text(max_size=2), ATOMS, max_size=2)
FAULTS = ["", "{}", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "[1] 2", "[1}", '["a', "[1.]", "[tru]", "[1.5", "[-]"]


def found(text: str, piece: int) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "PIECE", piece)
        return [*entries(io.StringIO(text))]


@settings(max_examples=40)
@given(st.lists(VALUES, max_size=4), st.sampled_from([None, 1]), st.integers(1, 40))
def test_entries_are_those_of_the_whole(values: list[Any], indent: int | None, piece: int) -> None:
    text = f"\n {json.dumps(values, indent=indent)}\r\n\t"
    assert found(text, piece) == values


@pytest.mark.parametrize("piece", [1, 2, 100])
@pytest.mark.parametrize("text", FAULTS)
def test_what_is_no_array(text: str, piece: int) -> None:
    with pytest.raises(json.JSONDecodeError):
        found(text, piece)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le"])
def test_a_long_array_is_never_whole_in_memory(encoding: str, tmp_path: Path) -> None:
    path, rows = tmp_path / "d.json", [{"prompt": f"{line}+é=" * 200} for line in range(1000)]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)
    tracemalloc.start()
    for number, (source, row) in enumerate(json_rows(path)):
        assert (source, row) == (f"{path}#{number + 1}", rows[number])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == len(rows) - 1
    assert peak < path.stat().st_size
