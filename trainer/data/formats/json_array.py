"""The entries of one JSON array, which is read a piece at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

PIECE = 1 << 16  # characters that are read at least
_WHITE = re.compile(r"[ \t\r\n]*")


def entries(file: TextIO) -> Iterator[Any]:
    """Each entry as soon as it is read.

    Raises:
        json.JSONDecodeError: Where the file is no array; its position is that after the last entry.
    """
    text = _Window(file)
    text.take("[")
    if text.peek() != "]":
        yield text.value()
        while text.peek() == ",":
            text.take(",")
            yield text.value()
    text.take("]")
    if text.peek():
        raise text.error("Extra data")


class _Window:
    """What is read of a file and not yet taken."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._place = file, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while (place := self._after_white(self._place)) == len(self._text) and self._more():
            pass
        self._place = place
        return self._text[place : place + 1]

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.error(f"Expecting {mark!r}")
        self._place += 1

    def value(self) -> Any:
        """The next value. It is whole only where what follows is there too: a number may go on."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self.error(error.msg, error.pos - self._place) from error
                continue
            after = self._after_white(end)
            if self._text[after : after + 1] in {",", "]"} or not self._more():
                self._place = end
                return value

    def error(self, message: str, place: int = 0) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text[self._place :], place)

    def _after_white(self, place: int) -> int:
        found = _WHITE.match(self._text, place)
        assert found is not None
        return found.end()

    def _more(self) -> bool:
        """Reads as much again as there is: what a long value costs stays in proportion to its length."""
        new = self._file.read(max(PIECE, len(self._text) - self._place))
        if new:
            self._text, self._place = self._text[self._place :] + new, 0
        return bool(new)
