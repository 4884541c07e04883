"""What messages repeat of an answer: short, on one line, without keys, and with nothing that a terminal would obey."""

from __future__ import annotations

import re
import reprlib

QUOTED = 300  # characters that a message repeats
QUOTED_VALUE = 80  # characters of a value in an answer
_keys: list[re.Pattern[str]] = []


def conceal(key: str) -> None:
    """From now on every quote has *** for the key, also where JSON, a URL or HTML writes its characters in another way."""
    spelled = "".join(
        rf"(?:\\?{re.escape(c)}|\\u{ord(c):04x}|%{ord(c):02x}|&#0*{ord(c)};|&#x0*{ord(c):x};)" for c in key
    )
    pattern = re.compile(spelled, re.IGNORECASE)
    if pattern not in _keys:
        _keys.append(pattern)


def quote(text: str, most: int = QUOTED) -> str:
    """The start of a text; characters that cannot be printed are shown by their codes."""
    for key in _keys:
        text = key.sub("***", text)
    text = " ".join(text.lstrip()[: 10 * most].split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return shown if len(shown) <= most else shown[:most] + "…"


def quote_address(url: str) -> str:
    """The start of a URL; what may hold a secret is left out: a user with a password, a query."""
    url = re.sub(r"//[^/?#\\]*@", "//***@", url)
    return quote(re.sub(r"[?#].*", "?***", url, flags=re.DOTALL))


def quote_value(value: object) -> str:
    """The start of a value that JSON can hold."""
    return quote(_QUOTER.repr(value), QUOTED_VALUE)


class _Quoter(reprlib.Repr):
    """Text is quoted as `quote` does it: what is left of a key that was cut could not be found any more."""

    maxlevel, maxdict, maxlist = 3, 3, 4

    def repr_str(self, text: str, level: int) -> str:
        return f"'{quote(text, QUOTED_VALUE)}'"


_QUOTER = _Quoter()
