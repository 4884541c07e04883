"""Any JSON, in any place of an answer. Needs hypothesis."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD = [None, True, 5, 0.5, -1, 10**9, 2**70, math.nan, math.inf, -math.inf, "", "abc", [], [1], {}, {"a": 1}]
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 10**9, 2**70, -(10**400), 10**400, 1e-4, -9999.0])
TEXTS = st.text(max_size=5) | st.sampled_from(["5", "05", " 5", "-5", "token_id:5", "token_id:", "9" * 5000])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value, and to every key of an object (its last step is a tuple)."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(value, dict):
            yield (*path, (key,))
        yield from places(inner, (*path, key))


def replaced(answer: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(answer)
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    if isinstance(path[-1], tuple):
        inner[value if isinstance(value, str) else json.dumps(value)] = inner.pop(path[-1][0])
    else:
        inner[path[-1]] = value
    return changed
