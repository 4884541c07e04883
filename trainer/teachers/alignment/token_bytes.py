"""The bytes of every token of a tokenizer, exactly: nothing is decoded and compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.tokenizers import text_tokens
from fastkl.trainer.teachers.alignment.spelling import Unknown, spelling

_PROBED = 256  # tokens that are read, written as a text and encoded again
_AGREEING = 0.9  # of them; a normaliser may change the others
SPACE = b" "


class TokenBytes:
    """What each id of a tokenizer writes.

    A token that was added to the vocabulary, special or not, writes its own text, as a decoded text shows it: so nothing
    that a model writes is hidden from the other. An id that is no token writes nothing: a row that pads a head, and what
    converters name [PAD…].

    `name` is what messages call the tokenizer. Raises ConfigError where the bytes cannot be known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "teacher") -> None:
        self.tokenizer = tokenizer
        try:
            self._bytes = _table(tokenizer)
            self._lengths = np.array([len(entry) for entry in self._bytes], np.int32)
            self._check()
        except Unknown as error:
            raise ConfigError(
                f"the bytes of the {name}'s tokens cannot be known: {type(tokenizer).__name__}, {error}. Take a {name} "
                f"whose tokenizer is a byte-level BPE or a SentencePiece one, with a tokenizer.json"
            ) from error

    def __getitem__(self, token: int) -> bytes:
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def lengths(self, ids: npt.ArrayLike) -> Array:
        """The number of bytes of each id, int32 [n]; 0 for one that is no token."""
        ids = np.asarray(ids, np.int64)
        known = (ids >= 0) & (ids < len(self._lengths))
        return np.where(known, self._lengths[np.where(known, ids, 0)], 0).astype(np.int32)

    def join(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.__getitem__, ids))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts alone: without special tokens around them, and no special token is read out of a text."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded: list[list[int]] = self.tokenizer(list(texts), padding=False, truncation=False, **options)["input_ids"]
        return encoded

    def _check(self) -> None:
        """The tokens of a text write that text, where it is made of the tokenizer's own: two of them, and a space."""
        own = self._texts()
        if not own:
            raise Unknown("none of its tokens is a text")
        texts = [*own, *(f"{a.strip()} {b.strip()}" for a, b in zip(own, reversed(own), strict=True))]
        pairs = zip(texts, self.encode(texts), strict=True)
        written = [(text, self.join(ids)) for text, ids in pairs if self.tokenizer.unk_token_id not in ids]
        failed = [pair for pair in written if not _agree(*pair)]
        if len(failed) > (1 - _AGREEING) * len(texts):
            text, found = failed[0]
            raise Unknown(f"the tokens of {text!r} would write {found!r}")

    def _texts(self) -> list[str]:
        """What some tokens write, from all over the vocabulary, where that is text."""
        added = self.tokenizer.added_tokens_decoder
        ids = [token for token, entry in enumerate(self._bytes) if entry.strip() and token not in added]
        entries = (self._bytes[token] for token in ids[:: len(ids) // _PROBED + 1])
        return [text for entry in entries if "\ufffd" not in (text := entry.decode(errors="replace"))]


def _table(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of the ids from 0 on."""
    read = spelling(tokenizer).read
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    found = {token: read(entry) for token, entry in text_tokens(tokenizer).items()}
    for token, added in tokenizer.added_tokens_decoder.items():
        # One that the model has too may be spelled as its entries are: "Ċ" of Falcon's tokenizer, which ends a line.
        if token in found and (added.special or model is None or model.token_to_id(added.content) is None):
            found[token] = added.content.encode()
    return [found.get(token, b"") for token in range(max(found, default=-1) + 1)]


def _agree(text: str, written: bytes) -> bool:
    """Whether tokens of a text write it, maybe with a space put before it, or without those that have no token."""
    wanted = text.encode()
    return written in (wanted, SPACE + wanted, wanted.replace(SPACE, b""))
