"""The bytes of every token of a tokenizer, exactly: nothing is decoded and compared."""

from __future__ import annotations

import itertools
import re
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
_STARTS = ("\n", ".", "1")  # before a text that is to have no space, cut off again


class TokenBytes:
    """What each id of a tokenizer writes.

    A token that was added to the vocabulary, special or not, writes its own text, as a decoded text shows it: so nothing
    that a model writes is hidden from the other. An id that is no token writes nothing: a row that pads a head, and what
    converters name [PAD…].

    `name` is what messages call the tokenizer. Raises ConfigError where the bytes cannot be known.

    Attributes:
        added: Ids that were added to the vocabulary, as far as they are tokens.
        special: Those of them that no text is to have.
        all: What its tokens write.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "teacher") -> None:
        self.tokenizer = tokenizer
        try:
            self._bytes = _table(tokenizer)
            self.all = frozenset(filter(None, self._bytes))
            self._lengths = np.array([len(entry) for entry in self._bytes], np.int32)
            added = {token: each for token, each in tokenizer.added_tokens_decoder.items() if self[token]}
            self.added = frozenset(added)
            self.special = frozenset(token for token, each in added.items() if each.special)
            self._check()
        except Unknown as error:
            raise ConfigError(
                f"the bytes of the {name}'s tokens cannot be known: {type(tokenizer).__name__}, {error}. Take a {name} "
                f"whose tokenizer is a byte-level BPE or a SentencePiece one, with a tokenizer.json"
            ) from error
        self._spaces_first, self._spaces_after_added = self._habits()

    @property
    def count(self) -> int:
        """Ids are below it."""
        return len(self._bytes)

    def __getitem__(self, token: int) -> bytes:
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def lengths(self, ids: npt.ArrayLike) -> Array:
        """The number of bytes of each id, int32 [n]; 0 for one that is no token."""
        ids = np.asarray(ids, np.int64)
        known = (ids >= 0) & (ids < len(self._lengths))
        return np.where(known, self._lengths[np.where(known, ids, 0)], 0).astype(np.int32)

    def join(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.__getitem__, ids))

    def written(self, ids: Sequence[int], before: int | None) -> tuple[bytes, Array]:
        """What ids after another write, and the length of each, without the spaces that no text has (see `encode`)."""
        entries, lengths = [self[token] for token in ids], self.lengths(ids)
        for place, last in enumerate([before, *ids][: len(ids)] if self._spaces_first else []):
            if self._puts_space(last) and entries[place].startswith(SPACE):
                entries[place] = entries[place][1:]
                lengths[place] -= 1
        return b"".join(entries), lengths

    def encode(self, texts: Sequence[str], before: Sequence[int | None]) -> list[list[int]]:
        """The ids of texts, each after the id `before` it (None: it is the first). No special token is read out of a text.

        Some tokenizers put a space before a text, at the very beginning or after each added token. There it is in the ids,
        elsewhere not.
        """
        found = self._encode(texts)
        if not self._spaces_first:
            return found
        bare = [place for place, last in enumerate(before) if not self._puts_space(last)]
        for start in _STARTS:
            first = self._encode([start])[0]
            after = self._encode([start + texts[place] for place in bare])
            known = [bool(first) and ids[: len(first)] == first for ids in after]
            for place, ids in itertools.compress(zip(bare, after, strict=True), known):
                found[place] = ids[len(first) :]
            bare = [place for place, done in zip(bare, known, strict=True) if not done]
        return found

    def _puts_space(self, before: int | None) -> bool:
        return self._spaces_first if before is None else self._spaces_after_added and before in self.added

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts alone, without any special token."""
        if not texts:
            return []
        found = self._ids(list(texts), split_special_tokens=True)
        for place, ids in enumerate(found):
            if self.special.intersection(ids) - {self.tokenizer.unk_token_id}:  # it knows no such option
                found[place] = [token for part in self._in_parts(texts[place]) for token in self._ids([part])[0]]
        return found

    def _ids(self, texts: list[str], **options: bool) -> list[list[int]]:
        options |= {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        encoded: list[list[int]] = self.tokenizer(texts, **options)["input_ids"]
        return encoded

    def _in_parts(self, text: str) -> list[str]:
        """Cut after the first character of each special token."""
        special = "|".join(re.escape(self[token].decode()) for token in sorted(self.special, reverse=True))
        cuts = [found.start() + 1 for found in re.finditer(f"(?={special})", text)]
        return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)]) if end > start]

    def _habits(self) -> tuple[bool, bool]:
        """Whether it puts a space before a text that stands first, and before one after an added token."""
        word = next((text for text in self._texts() if text.isalnum()), "")
        spaced = SPACE + word.encode()
        first = bool(word) and self.join(self._encode([word])[0]) == spaced
        special = min(self.special - {self.tokenizer.unk_token_id}, default=None)
        if special is None or not first:
            return first, False
        ids = self._ids([self[special].decode() + word])[0]
        return first, ids[:1] == [special] and self.join(ids[1:]) == spaced

    def _check(self) -> None:
        """The tokens of a text write that text, where it is made of the tokenizer's own: two of them, and a space."""
        own = self._texts()
        if not own:
            raise Unknown("none of its tokens is a text")
        texts = [*own, *(f"{a.strip()} {b.strip()}" for a, b in zip(own, reversed(own), strict=True))]
        pairs = zip(texts, self._encode(texts), strict=True)
        written = [(text, self.join(ids)) for text, ids in pairs if self.tokenizer.unk_token_id not in ids]
        failed = [pair for pair in written if not _agree(*pair)]
        if len(failed) > (1 - _AGREEING) * len(texts):
            text, found = failed[0]
            raise Unknown(f"the tokens of {text!r} would write {found!r}")

    def _texts(self) -> list[str]:
        """What some tokens write, from all over the vocabulary, where that is text."""
        ids = [token for token, entry in enumerate(self._bytes) if entry.strip() and token not in self.added]
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
