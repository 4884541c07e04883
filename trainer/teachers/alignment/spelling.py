"""How a tokenizer's vocabulary spells bytes. A decoder says it; where none does, the tokenizer is refused."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.models.tokenizers import BYTE_LEVEL

_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")
_META = "▁"
# Of each character the one of its byte's number; those that stand for no byte have none in latin-1.
_BYTES = dict.fromkeys(range(256), "\uffff") | {ord(letter): chr(byte) for letter, byte in BYTE_LEVEL.items()}


class Unknown(ValueError):
    """Why the bytes of a tokenizer cannot be known."""


class Spelling(NamedTuple):
    """What stands for what in the entries of a vocabulary."""

    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False  # "<0x0A>" is one byte
    byte_level: bool = False  # a character for each byte, which need not be its own

    def read(self, entry: str | bytes) -> bytes:
        if isinstance(entry, bytes):  # as vocabularies of tiktoken have them
            return entry
        for old, new in self.replaced:
            entry = entry.replace(old, new)
        if self.byte_fallback and (byte := _FALLBACK.fullmatch(entry)):
            return bytes.fromhex(byte[1])
        if self.byte_level:
            try:
                return entry.translate(_BYTES).encode("latin-1")
            except UnicodeEncodeError:  # some other text
                pass
        return entry.encode()


def spelling(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """Raises Unknown, with what stands in the way."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _of_python(tokenizer) if backend is None else _of_backend(backend)


def _of_backend(backend: Any) -> Spelling:
    """Of a tokenizer of the package tokenizers: what its decoder undoes."""
    model = backend.model
    kind = type(model).__name__
    if kind == "WordPiece":
        raise Unknown("WordPiece drops the white space of a text")
    for part in ("continuing_subword_prefix", "end_of_word_suffix"):
        if getattr(model, part, None):
            raise Unknown(f"its tokens are marked with {getattr(model, part)!r}, which drops the white space of a text")
    found = Spelling(byte_fallback=bool(getattr(model, "byte_fallback", False)))
    fused = False
    for step in _steps(backend.decoder):
        name = step["type"]
        if name == "ByteLevel":
            found = found._replace(byte_level=True)
        elif name == "Metaspace":
            found = found._replace(replaced=(*found.replaced, (step["replacement"], " ")))
        elif name == "Replace" and "String" in step["pattern"]:
            found = found._replace(replaced=(*found.replaced, (step["pattern"]["String"], step["content"])))
        elif name == "ByteFallback":
            found = found._replace(byte_fallback=True)
        elif name == "Fuse":
            fused = True
        elif name != "Strip" or not fused:  # of the whole text: what stands first was put there
            raise Unknown(f"nothing is known of its decoder {name}")
    return found


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _of_python(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """Of a tokenizer that is written in Python: those of tiktoken, of GPT-2's kind and of SentencePiece."""
    if any(isinstance(entry, bytes) for entry in tokenizer.get_vocab()):
        return Spelling()
    if getattr(tokenizer, "byte_decoder", None) == BYTE_LEVEL:
        return Spelling(byte_level=True)
    if hasattr(tokenizer, "sp_model"):
        return Spelling(replaced=((_META, " "),), byte_fallback=True)
    raise Unknown("it is written in Python and is of no kind that is known here")
